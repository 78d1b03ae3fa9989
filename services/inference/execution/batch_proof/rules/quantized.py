"""Operators of com.microsoft on quantised tensors, and those that compute a scale when they run."""

from __future__ import annotations

from services.inference.execution.batch_proof.abstract_value import Tensor
from services.inference.execution.batch_proof.operator_call import (
    NotProvenError,
    OperatorCall,
    broadcast,
    common_rows,
    from_front,
    not_along,
)
from services.inference.execution.batch_proof.registry import MICROSOFT, Outcome, rule
from services.inference.execution.batch_proof.rules.contractions import one_value, product_of_matrices
from services.inference.execution.batch_proof.rules.layout import joined


@rule("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def qlinear_elementwise(call: OperatorCall) -> Outcome:
    """Elementwise on two tensors, each with a scale and a zero point."""
    call.batch_independent_except(0, 3)
    shape = broadcast([call.shape(0), call.shape(3)], call.symbols)
    return Tensor(shape, common_rows([call.input(0), call.input(3)], len(shape)))


@rule("QLinearSigmoid", "QLinearLeakyRelu", domain=MICROSOFT)
def qlinear_function(call: OperatorCall) -> Outcome:
    """Elementwise on one tensor."""
    call.batch_independent_except(0)
    return Tensor(call.input(0).shape, call.input(0).rows)


@rule("QLinearSoftmax", domain=MICROSOFT)
def qlinear_softmax(call: OperatorCall) -> Outcome:
    """As Softmax of the version in the attribute `opset`."""
    call.batch_independent_except(0)
    shape = call.shape(0)
    axis = call.axis("axis", -1, len(shape))
    last = axis + 1 if call.attribute("opset", 0) >= 13 else len(shape)
    not_along(call.input(0).rows, range(axis, last), "normalises over")
    return Tensor(shape, call.input(0).rows)


@rule("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(call: OperatorCall) -> Outcome:
    """Joins tensors, each followed by its scale and zero point in the inputs."""
    data = range(2, len(call.inputs), 3)
    call.batch_independent_except(*data)
    tensors = [call.input(place) for place in data]
    return joined(tensors, from_front(int(call.attribute("axis")), len(call.shape(2))), call)


@rule("QGemm", domain=MICROSOFT)
def qgemm(call: OperatorCall) -> Outcome:
    """A product with weights."""
    call.batch_independent_except(0)
    one_value(call.input(1))
    one_value(call.input(2))
    flip_a, flip_b = bool(call.attribute("transA", 0)), bool(call.attribute("transB", 0))
    return product_of_matrices(call, call.input(0), call.input(3), flip_a=flip_a, flip_b=flip_b)


@rule("DynamicQuantizeMatMul", "DynamicQuantizeLSTM", domain=MICROSOFT)
def dynamic(call: OperatorCall) -> Outcome:
    """The whole input is quantised with one scale."""
    raise NotProvenError("its scale is computed over all rows")
