"""Elementwise operators on known and symbolic numbers. Exporters compute shapes with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from services.inference.execution.batch_proof.abstract_value import Values, as_size, plain
from services.inference.execution.batch_proof.operator_call import NotProvenError
from services.inference.execution.batch_proof.sizes import Size, Symbols

# Longer tensors do not count as shapes.
MOST_ELEMENTS = 128
# Beyond these limits, results of 32-bit integers and floats differ from Python's.
_EXACT_INTEGER = 1 << 31
_EXACT_FLOAT = 1 << 24

_NUMERIC: dict[str, Callable[..., Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Min": min,
    "Max": max,
    "Equal": lambda a, b: a == b,
    "Less": lambda a, b: a < b,
    "LessOrEqual": lambda a, b: a <= b,
    "Greater": lambda a, b: a > b,
    "GreaterOrEqual": lambda a, b: a >= b,
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
    "Not": lambda a: not a,
    "Neg": lambda a: -a,
    "Abs": abs,
    "Floor": lambda a: a,  # known floats are whole
    "Ceil": lambda a: a,
    "Round": lambda a: a,
    "Identity": lambda a: a,
}
OPERATORS = frozenset({*_NUMERIC, "Div", "Mod", "Where", "Cast"})
_WHOLE = frozenset({TensorProto.INT64, TensorProto.INT32})
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE})


def number(value: Any, symbols: Symbols) -> Any:
    """An element of a constant; a symbol for a number that arithmetic here does not represent exactly."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    value = float(value)
    return value if abs(value) < _EXACT_FLOAT and value.is_integer() else symbols.number()


def compute(operator: str, operands: Sequence[Values], to: int, symbols: Symbols) -> Values:
    """Computes elementwise, with broadcasting. `to`: type of Cast. Raises NotProvenError if B would become a value."""
    arrays = np.broadcast_arrays(*operands)
    result = np.empty(arrays[0].shape, object)
    for index in np.ndindex(result.shape):
        result[index] = _one(operator, [plain(array[index]) for array in arrays], to, symbols)
    return result


def _one(operator: str, operands: list[Any], to: int, symbols: Symbols) -> Any:
    made = _exact(operator, operands, to, symbols)
    if made is not None:
        return made
    if any(isinstance(operand, Size) and operand.counts_rows for operand in operands):
        raise NotProvenError("the number of rows becomes a value")
    return symbols.number()


def _exact(operator: str, operands: list[Any], to: int, symbols: Symbols) -> Any:
    if operator == "Where":
        condition, yes, no = operands
        if isinstance(condition, Size):
            return yes if yes == no else None
        return yes if condition else no
    if operator == "Cast":
        return _cast(operands[0], to)
    if not any(isinstance(operand, Size) for operand in operands):
        return _numeric(operator, operands)
    if any(isinstance(operand, float) for operand in operands):
        operands = [int(operand) if isinstance(operand, float) else operand for operand in operands]
    return _symbolic(operator, operands, symbols)


def _numeric(operator: str, operands: list[Any]) -> Any:
    if operator in ("Div", "Mod"):
        dividend, divisor = operands
        if operator == "Mod":
            return dividend % divisor if divisor and isinstance(dividend, int) else None
        if divisor == 0 or (isinstance(dividend, float) and dividend % divisor):
            return None
        quotient = abs(dividend) // abs(divisor)
        result: Any = quotient if (dividend < 0) == (divisor < 0) else -quotient
    else:
        result = _NUMERIC[operator](*operands)
    limit = _EXACT_FLOAT if isinstance(result, float) else _EXACT_INTEGER
    return result if isinstance(result, bool) or abs(result) < limit or operator in ("Identity", "Min", "Max") else None


def _cast(value: Any, to: int) -> Any:
    if isinstance(value, Size):
        if to == TensorProto.BOOL:
            return True if _bounds(value)[0] > 0 else None
        # A symbol that may be negative may also be a fraction, which a cast changes.
        return value if value.nonnegative and to in _WHOLE | _FLOATS else None
    if to in _WHOLE:
        return int(value) if to == TensorProto.INT64 or abs(value) < _EXACT_INTEGER else None
    if to in _FLOATS:
        return float(value) if abs(value) < _EXACT_FLOAT else None
    return bool(value) if to == TensorProto.BOOL else None


def _symbolic(operator: str, operands: list[Any], symbols: Symbols) -> Any:
    """The result for whole numbers and sizes; None if it is not known."""
    if operator == "Identity":
        return operands[0]
    if any(isinstance(operand, Size) and not operand.nonnegative for operand in operands):
        return None  # it may be a fraction, or NaN
    if operator in ("Floor", "Ceil", "Round", "Abs"):
        return operands[0]
    if len(operands) != 2 or any(isinstance(operand, bool) for operand in operands):
        return None
    one, other = map(as_size, operands)
    if operator == "Mul":
        return plain(one * other)
    if operator == "Div":
        quotient = one.divided_by(other)
        return None if quotient is None or not other.nonnegative else plain(quotient)
    if operator in ("Add", "Sub"):
        return _sum(one, other if operator == "Add" else other * Size(-1), symbols)
    if one == other:
        return {"Equal": True, "LessOrEqual": True, "GreaterOrEqual": True, "Less": False, "Greater": False}.get(
            operator, plain(one)
        )
    return _compared(operator, one, other)


def _sum(one: Size, other: Size, symbols: Symbols) -> Any:
    if one.symbols == other.symbols:
        return plain(
            Size(one.coefficient + other.coefficient, one.symbols if one.coefficient + other.coefficient else ())
        )
    if other.coefficient == 0 or one.coefficient == 0:
        return plain(one if other.coefficient == 0 else other)
    if one.counts_rows or other.counts_rows:
        return None
    make = symbols.size if one.nonnegative and other.nonnegative else symbols.number
    return make(("sum", frozenset((one, other))))


def _bounds(size: Size) -> tuple[float, float]:
    if size.known is not None:
        return size.known, size.known
    # There is at least one row.
    least = size.coefficient if size.symbols == (0,) else 0
    return (least, math.inf) if size.nonnegative else (-math.inf, math.inf)


def _compared(operator: str, one: Size, other: Size) -> Any:
    (low, high), (other_low, other_high) = _bounds(one), _bounds(other)
    below, above = high <= other_low, low >= other_high
    if operator == "Min" and (below or above):
        return plain(one if below else other)
    if operator == "Max" and (below or above):
        return plain(other if below else one)
    if operator == "Equal" and (high < other_low or low > other_high):
        return False
    if operator in ("Less", "GreaterOrEqual") and (high < other_low or above):
        return (high < other_low) == (operator == "Less")
    if operator in ("Greater", "LessOrEqual") and (low > other_high or below):
        return (low > other_high) == (operator == "Greater")
    return None
