"""If, Loop and Scan. The prover also walks their graphs. Their conditions must be the same in all batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import onnx

from services.inference.execution.batch_proof.abstract_value import Content, RowAxis, Tensor, Unknown, Value
from services.inference.execution.batch_proof.operator_call import NotProvenError, from_front, not_along, shape_of
from services.inference.execution.batch_proof.scope import Scope
from services.inference.execution.batch_proof.sizes import Size, Symbols, made_after

OPERATORS = frozenset({"If", "Loop", "Scan"})
# Limit for the walks over a body until nothing changes. Each walk removes a known fact about a state.
_MOST_TURNS = 16


class Walk(Protocol):
    """Walks the graph of a body; prover.Walk implements it."""

    symbols: Symbols

    def run(self, graph: onnx.GraphProto, scope: Scope) -> list[Value]:
        """Walks a graph and returns its outputs."""


class Node(NamedTuple):
    """`name`: for messages; not unique. `place`: the output names of the enclosing nodes and its own; unique."""

    name: str
    place: tuple[tuple[str, ...], ...]


def apply(
    operator: str,
    inputs: Sequence[Tensor | None],
    attributes: Mapping[str, Any],
    outputs: tuple[str, ...],
    scope: Scope,
    walk: Walk,
    name: str,
) -> Sequence[Value]:
    """Returns the outputs. `outputs`: their names, unique to this node in its graph. Raises NotProvenError."""
    node = Node(name, (*scope.place, outputs))
    if operator == "If":
        return _if(inputs, attributes, scope, walk, node)
    made = walk.symbols.made
    if operator == "Loop":
        states = _loop(inputs, attributes, scope, walk, node)
    else:
        states = _scan(inputs, attributes, scope, walk, node)
    return [_after(value, made, walk.symbols) for value in states]


def _if(
    inputs: Sequence[Tensor | None], attributes: Mapping[str, Any], scope: Scope, walk: Walk, node: Node
) -> Sequence[Value]:
    condition = inputs[0]
    if condition is None or not condition.independent:
        raise NotProvenError("its condition depends on the rows")
    known = None if condition.values is None else condition.values.flat[0]
    names = ["then_branch", "else_branch"]
    if isinstance(known, bool):
        names.remove("else_branch" if known else "then_branch")
    first, *others = [walk.run(attributes[branch], scope.inner(f"{node.name}, ", node.place)) for branch in names]
    for other in others:
        first = [
            _joined(one, two, walk.symbols, node, place)
            for place, (one, two) in enumerate(zip(first, other, strict=True))
        ]
    return first


def _loop(
    inputs: Sequence[Tensor | None], attributes: Mapping[str, Any], scope: Scope, walk: Walk, node: Node
) -> Sequence[Value]:
    """Inputs: trip count, condition and states. Inputs of the body: iteration number, condition and states."""
    count, condition, *initial = inputs
    if any(one is not None and not one.independent for one in (count, condition)):
        raise NotProvenError("how often it runs depends on the rows")
    body = attributes["body"]

    def turn(states: Sequence[Value]) -> Sequence[Value]:
        inner = scope.inner(f"{node.name}, ", node.place)
        values = [Tensor(()), Tensor(()), *states]
        inner.values.update({one.name: value for one, value in zip(body.input, values, strict=True)})
        goes_on, *rest = walk.run(body, inner)
        if isinstance(goes_on, Unknown):
            raise NotProvenError(f"its condition depends on the rows: {goes_on.reason}")
        if not goes_on.independent:
            raise NotProvenError("its condition depends on the rows")
        return rest

    states, stacked = _settled(turn, initial, walk.symbols, node)
    return [*states, *(_stacked(value, 0, walk.symbols) for value in stacked)]


def _scan(
    inputs: Sequence[Tensor | None], attributes: Mapping[str, Any], scope: Scope, walk: Walk, node: Node
) -> Sequence[Value]:
    """Inputs: states, and tensors that are scanned. The body gets one slice of each per iteration."""
    if scope.opsets.get("", 9) < 9:
        raise NotProvenError("there is no rule for it before opset 9")
    body = attributes["body"]
    count = int(attributes["num_scan_inputs"])
    scanned = list(inputs[len(inputs) - count :])
    axes = list(attributes.get("scan_input_axes") or [0] * count)
    slices = [_slice(tensor, axis) for tensor, axis in zip(scanned, axes, strict=True)]

    def turn(states: Sequence[Value]) -> Sequence[Value]:
        inner = scope.inner(f"{node.name}, ", node.place)
        inner.values.update({one.name: value for one, value in zip(body.input, [*states, *slices], strict=True)})
        return walk.run(body, inner)

    states, stacked = _settled(turn, inputs[: len(inputs) - count], walk.symbols, node)
    places = list(attributes.get("scan_output_axes") or [0] * len(stacked))
    return [*states, *(_stacked(value, at, walk.symbols) for value, at in zip(stacked, places, strict=True))]


def _settled(
    turn: Any, initial: Sequence[Tensor | None], symbols: Symbols, node: Node
) -> tuple[list[Value], list[Value]]:
    """The facts that hold for the states before and after every turn, and those of the other outputs of a turn."""
    states: list[Value] = [Unknown(f"{node.name}: a state is missing") if one is None else one for one in initial]
    for _ in range(_MOST_TURNS):
        made = turn(states)
        joined = [
            _joined(before, after, symbols, node, place)
            for place, (before, after) in enumerate(zip(states, made, strict=False))
        ]
        if all(_same(before, after) for before, after in zip(states, joined, strict=True)):
            return states, list(made[len(states) :])
        states = joined
    raise NotProvenError("what is known of its states does not settle")


def _same(one: Value, other: Value) -> bool:
    if isinstance(one, Unknown) or isinstance(other, Unknown):
        return isinstance(one, Unknown) and isinstance(other, Unknown)
    values = (one.values is None) == (other.values is None)
    return values and (one.shape, one.rows, one.below) == (other.shape, other.rows, other.below)


def _joined(one: Value, other: Value, symbols: Symbols, node: Node, place: int) -> Value:
    """The facts that hold for both values."""
    if isinstance(one, Unknown):
        return one
    if isinstance(other, Unknown):
        return other
    if one.rows != other.rows or {one.content, other.content} != {Content.OWN}:
        return Unknown(f"{node.name}: output {place} has rows only sometimes, or along another axis")
    same_values = (
        one.values is not None
        and other.values is not None
        and one.values.shape == other.values.shape
        and bool((one.values == other.values).all())
    )
    if not same_values and (one.counts_rows or other.counts_rows):
        return Unknown(f"{node.name}: output {place} has the number of rows as a value")
    if one.shape is None or other.shape is None or len(one.shape) != len(other.shape):
        if one.rows is not None:
            return Unknown(f"{node.name}: output {place} has several shapes")
        return Tensor(None)
    shape = tuple(
        size if size == another else symbols.size(("joined", node.place, place, axis))
        for axis, (size, another) in enumerate(zip(one.shape, other.shape, strict=True))
    )
    return Tensor(shape, one.rows, one.values if same_values else None)


def _after(value: Value, made: int, symbols: Symbols) -> Value:
    """The facts after the last turn. Sizes that may differ between turns become new symbols."""
    if isinstance(value, Unknown):
        return value
    if value.rows is not None and any(made_after(size, made) for size in (value.rows.outer, value.rows.inner)):
        return Unknown("a loop changes how many elements a row has along one axis")
    shape = value.shape
    if shape is not None:
        shape = tuple(symbols.size() if made_after(size, made) else size for size in shape)
    values = value.values
    if values is not None and any(isinstance(one, Size) and made_after(one, made) for one in values.flat):
        if value.counts_rows:
            return Unknown("a loop computes with the number of rows")
        values = None
    return Tensor(shape, value.rows, values)


def _slice(tensor: Tensor | None, axis: int) -> Tensor:
    if tensor is None or tensor.counts_rows or tensor.content is not Content.OWN:
        raise NotProvenError("the number of rows, or of a row, becomes a value")
    shape = shape_of(tensor, "what it scans")
    axis = from_front(axis, len(shape))
    not_along(tensor.rows, [axis], "scans")
    rows = None if tensor.rows is None else tensor.rows.at(tensor.rows.axis - (axis < tensor.rows.axis))
    return Tensor((*shape[:axis], *shape[axis + 1 :]), rows)


def _stacked(value: Value, axis: int, symbols: Symbols) -> Value:
    """The values of all turns, stacked along a new axis."""
    if isinstance(value, Unknown):
        return value
    if value.counts_rows or value.content is not Content.OWN:
        return Unknown("a loop collects numbers of rows")
    if value.shape is None:
        return Tensor(None)
    axis = from_front(axis, len(value.shape) + 1)
    rows: RowAxis | None = None if value.rows is None else value.rows.at(value.rows.axis + (axis <= value.rows.axis))
    return Tensor((*value.shape[:axis], symbols.size(), *value.shape[axis:]), rows)
