"""Operators that compute each element from the elements at the same place, with broadcasting."""

from __future__ import annotations

from dataclasses import replace

from onnx import TensorProto

from services.inference.execution.batch_proof import arithmetic
from services.inference.execution.batch_proof.abstract_value import Content, Tensor, Values, as_size
from services.inference.execution.batch_proof.operator_call import (
    NotProvenError,
    OperatorCall,
    broadcast,
    common_rows,
    not_along,
    shape_of,
)
from services.inference.execution.batch_proof.registry import MICROSOFT, ML, Outcome, rule
from services.inference.execution.batch_proof.rules.layout import moved
from services.inference.execution.batch_proof.sizes import Size

_ALL_INPUTS = (
    "Abs",
    "Acos",
    "Acosh",
    "Add",
    "And",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitShift",
    "BitwiseAnd",
    "BitwiseNot",
    "BitwiseOr",
    "BitwiseXor",
    "Cast",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "Div",
    "Elu",
    "Equal",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "Greater",
    "GreaterOrEqual",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Less",
    "LessOrEqual",
    "Log",
    "Max",
    "Mean",
    "Min",
    "Mish",
    "Mod",
    "Mul",
    "Neg",
    "Not",
    "Or",
    "PRelu",
    "Pow",
    "Reciprocal",
    "RegexFullMatch",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "StringConcat",
    "Sub",
    "Sum",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
    "Where",
    "Xor",
)
_INTEGERS = frozenset({TensorProto.INT32, TensorProto.INT64})


@rule(*_ALL_INPUTS, counts=True, positions=True)
@rule("Gelu", "FastGelu", "BiasGelu", "QuickGelu", "BiasAdd", domain=MICROSOFT)
@rule("LabelEncoder", "CategoryMapper", "Binarizer", domain=ML)
def elementwise(call: OperatorCall) -> Outcome:
    """The rows of all inputs lie along one axis of the result. Inputs without rows have size 1 or no axis there."""
    tensors = call.given
    if (values := _values(call)) is not None:
        return Tensor(broadcast([shape_of(tensor, "an input") for tensor in tensors], call.symbols), values=values)
    if any(tensor.counts_rows for tensor in tensors):
        raise NotProvenError("the number of rows becomes a value")
    shape = broadcast([shape_of(tensor, "an input") for tensor in tensors], call.symbols)
    made = Tensor(shape, common_rows(tensors, len(shape)))
    if call.operator == "Identity" or (call.operator == "Cast" and call.attribute("to") in _INTEGERS):
        return moved(tensors[0], made.shape or (), made.rows)
    if any(tensor.content is not Content.OWN for tensor in tensors):
        return _position(call, made)
    return made


def _position(call: OperatorCall, made: Tensor) -> Tensor:
    """The result for row numbers. Tracks their product with a size, and its sum with a number below that size."""
    if len(call.given) == 2:
        one, other = call.given
        position, operand = (one, other) if one.content is Content.POSITION else (other, one)
        if position.content is Content.POSITION and operand.content is Content.OWN:
            if call.operator == "Mul" and operand.values is not None and operand.values.size == 1:
                factor = as_size(operand.values.flat[0])
                if factor.nonnegative:
                    return replace(made, content=Content.POSITION, stride=position.stride * factor)
            if call.operator == "Add" and _below(operand, position.stride):
                return replace(made, content=Content.POSITION_IN_ALL, stride=position.stride)
    return replace(made, content=Content.OF_POSITION)


def _below(tensor: Tensor, limit: Size) -> bool:
    """Whether all values are from 0 to below the limit."""
    if tensor.values is None or limit.known is None:
        return tensor.below == limit
    return all(isinstance(value, int) and 0 <= value < limit.known for value in tensor.values.flat)


def _values(call: OperatorCall) -> Values | None:
    """The values of the result; None if the inputs have no known values, or the operator does not compute shapes."""
    operands = [tensor.values for tensor in call.given]
    if (
        call.operator not in arithmetic.OPERATORS
        or call.attribute("fmod", 0)
        or any(values is None for values in operands)
    ):
        return None
    present = [values for values in operands if values is not None]
    if call.operator in ("Min", "Max") and len(present) != 2:
        return None
    if max(values.size for values in present) > arithmetic.MOST_ELEMENTS:
        return None
    return arithmetic.compute(call.operator, present, call.attribute("to", 0), call.symbols)


@rule("CastLike")
def cast_like(call: OperatorCall) -> Outcome:
    """Only the type of the second input matters."""
    tensor = call.input(0)
    return Tensor(tensor.shape, tensor.rows)


@rule("Dropout")
def dropout(call: OperatorCall) -> Outcome:
    """Passes the values on, except in training mode."""
    training = call.integers(2)
    if training is not None and any(training):
        raise NotProvenError("it draws random numbers in training mode")
    made = Tensor(call.input(0).shape, call.input(0).rows)
    return (made, made)


@rule("StringNormalizer")
def string_normalizer(call: OperatorCall) -> Outcome:
    """Changes case. Stop words would change the number of elements, so there must be none."""
    if call.attribute("stopwords"):
        raise NotProvenError("it removes elements")
    return Tensor(call.input(0).shape, call.input(0).rows)


@rule("QuantizeLinear", "DequantizeLinear")
@rule("QuantizeLinear", "DequantizeLinear", domain=MICROSOFT)
def quantize_linear(call: OperatorCall) -> Outcome:
    """Elementwise, with one scale for the whole tensor or scales along `axis`."""
    tensor = call.input(0)
    call.batch_independent_except(0)
    if call.attribute("block_size", 0):
        raise NotProvenError("it scales by blocks")
    shape = shape_of(tensor, "input 0")
    scale = shape_of(call.input(1), "the scale")
    if any(size.known != 1 for size in scale):
        if len(scale) != 1:
            raise NotProvenError("its scale has several axes")
        not_along(tensor.rows, [call.axis("axis", 1, len(shape))], "scales")
    return Tensor(shape, tensor.rows)
