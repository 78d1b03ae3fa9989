"""Operators that compute each element from the elements at the same place, with broadcasting."""

from __future__ import annotations

from dataclasses import replace

from onnx import TensorProto

from services.inference.execution.batch_proof import arithmetic
from services.inference.execution.batch_proof.abstract_value import Content, Tensor, Values, as_size
from services.inference.execution.batch_proof.operator_call import NotProvenError, OperatorCall, broadcast, shape_of
from services.inference.execution.batch_proof.registry import Outcome, rule
from services.inference.execution.batch_proof.rules.layout import moved
from services.inference.execution.batch_proof.sizes import Size
from services.inference.execution.graph import ELEMENTWISE

_INTEGERS = frozenset({TensorProto.INT32, TensorProto.INT64})


@rule(*ELEMENTWISE, "RegexFullMatch", "StringConcat", counts=True, positions=True)
@rule(*(f"com.microsoft.{name}" for name in ("Gelu", "FastGelu", "BiasGelu", "QuickGelu", "BiasAdd")))
@rule("ai.onnx.ml.LabelEncoder", "ai.onnx.ml.CategoryMapper", "ai.onnx.ml.Binarizer")
def elementwise(call: OperatorCall) -> Outcome:
    """The rows of all inputs lie along one axis of the result. Inputs without rows have size 1 or no axis there."""
    tensors = call.given
    if (values := _values(call)) is not None:
        return Tensor(broadcast([shape_of(tensor, "an input") for tensor in tensors], call.symbols), values=values)
    if any(tensor.counts_rows for tensor in tensors):
        raise NotProvenError("the number of rows becomes a value")
    made = call.broadcast(tensors)
    if call.operator == "Identity" or (call.operator == "Cast" and call.attribute("to") in _INTEGERS):
        return moved(tensors[0], made)
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
    if tensor.values is None or limit.known is None:
        return tensor.below == limit
    return all(isinstance(value, int) and 0 <= value < limit.known for value in tensor.values.flat)


def _values(call: OperatorCall) -> Values | None:
    """The values of the result; None if the inputs have no known values, or the operator does not compute shapes."""
    if call.operator not in arithmetic.OPERATORS or call.attribute("fmod", 0):
        return None
    known = [tensor.values for tensor in call.given if tensor.values is not None]
    if len(known) < len(call.given) or (call.operator in ("Min", "Max") and len(known) != 2):
        return None
    if max(values.size for values in known) > arithmetic.MOST_ELEMENTS:
        return None
    return arithmetic.compute(call.operator, known, call.attribute("to", 0), call.symbols)


@rule("CastLike")
def cast_like(call: OperatorCall) -> Outcome:
    """Only the type of the second input matters."""
    return call.same


@rule("Dropout")
def dropout(call: OperatorCall) -> Outcome:
    training = call.integers(2)
    if training is not None and any(training):
        raise NotProvenError("it draws random numbers in training mode")
    return (call.same, call.same)


@rule("StringNormalizer")
def string_normalizer(call: OperatorCall) -> Outcome:
    """Changes case. Stop words would change the number of elements, so there must be none."""
    if call.attribute("stopwords"):
        raise NotProvenError("it removes elements")
    return call.same
