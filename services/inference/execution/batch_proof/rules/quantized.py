"""Operators of com.microsoft on quantised tensors."""

from __future__ import annotations

from services.inference.execution.batch_proof.abstract_value import Tensor
from services.inference.execution.batch_proof.operator_call import (
    NotProvenError,
    OperatorCall,
    from_front,
    not_along,
    shape_of,
)
from services.inference.execution.batch_proof.registry import Outcome, rule
from services.inference.execution.batch_proof.rules.contractions import product_of_matrices, transposed
from services.inference.execution.batch_proof.rules.layout import joined
from services.inference.execution.batch_proof.sizes import ONE, Size


def _one_value(tensor: Tensor) -> None:
    if any(size != ONE for size in shape_of(tensor, "a scale or zero point")):
        raise NotProvenError("a scale or zero point has several values")


@rule("QuantizeLinear", "DequantizeLinear", "com.microsoft.QuantizeLinear", "com.microsoft.DequantizeLinear")
def quantize_linear(call: OperatorCall) -> Outcome:
    """Elementwise, with one scale for the whole tensor or scales along `axis`."""
    call.batch_independent_except(0)
    if call.attribute("block_size", 0):
        raise NotProvenError("it scales by blocks")
    made, scale = call.keeping((), ""), call.shape(1)
    if any(size.known != 1 for size in scale):
        if len(scale) != 1:
            raise NotProvenError("its scale has several axes")
        call.not_along([call.axis(1)], "scales")
    return made


@rule("com.microsoft.QLinearAdd", "com.microsoft.QLinearMul")
def qlinear_elementwise(call: OperatorCall) -> Outcome:
    """Elementwise on two tensors, each with a scale and a zero point."""
    call.batch_independent_except(0, 3)
    return call.broadcast([call.input(0), call.input(3)])


@rule("com.microsoft.QLinearSigmoid", "com.microsoft.QLinearLeakyRelu")
def qlinear_function(call: OperatorCall) -> Outcome:
    call.batch_independent_except(0)
    return call.same


@rule("com.microsoft.QLinearConcat")
def qlinear_concat(call: OperatorCall) -> Outcome:
    """Joins tensors, each followed by its scale and zero point in the inputs."""
    data = range(2, len(call.inputs), 3)
    call.batch_independent_except(*data)
    tensors = [call.input(index) for index in data]
    return joined(tensors, from_front(int(call.attribute("axis")), len(call.shape(2))), call)


# Quantised products: inputs with the right matrix, and with the scales and zero points of the left and the right one.
_MATRIX_INPUTS = {
    "MatMulInteger": (1, (2,), (3,)),
    "MatMulIntegerToFloat": (1, (2, 4), (3, 5)),
    "QLinearMatMul": (3, (1, 2, 6, 7), (4, 5)),
}


@rule("MatMulInteger", "QLinearMatMul", "com.microsoft.MatMulIntegerToFloat")
def quantised_matmul(call: OperatorCall) -> Outcome:
    """A scale or zero point may have a value per row or column of a matrix, unless the rows of the batch lie there."""
    right, of_left, of_right = _MATRIX_INPUTS[call.operator]
    call.batch_independent_except(0, right)
    for index in (*of_left, *(of_right if call.input(right).rows is not None else ())):
        if (value := call.maybe(index)) is not None:
            _one_value(value)
    made = product_of_matrices(call, call.input(0), call.input(right))
    if call.maybe(6) is not None and call.operator == "MatMulIntegerToFloat":
        not_along(made.rows, [len(made.shape or ()) - 1], "adds a bias along")
    return made


@rule("com.microsoft.QGemm")
def qgemm(call: OperatorCall) -> Outcome:
    call.batch_independent_except(0)
    _one_value(call.input(1))
    _one_value(call.input(2))
    return product_of_matrices(call, call.input(0), call.input(3), *transposed(call))


@rule("com.microsoft.MatMulNBits")
def matmul_n_bits(call: OperatorCall) -> Outcome:
    """A product with packed weights of N columns."""
    call.batch_independent_except(0)
    call.not_along([call.rank - 1], "sums over")
    return Tensor((*call.shape(0)[:-1], Size(int(call.attribute("N")))), call.rows)
