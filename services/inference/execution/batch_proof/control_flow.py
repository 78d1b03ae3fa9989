"""If, Loop and Scan: the prover also walks their graphs. Their conditions must be the same in all batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from services.inference.execution.batch_proof.abstract_value import Content, Tensor, Unknown, Value
from services.inference.execution.batch_proof.operator_call import (
    NotProvenError,
    OperatorCall,
    from_front,
    not_along,
    shape_of,
)
from services.inference.execution.batch_proof.reshaping import inserted, without
from services.inference.execution.batch_proof.sizes import Size, Symbols, made_after

OPERATORS = frozenset({"If", "Loop", "Scan"})
# Limit for the walks over a body until nothing changes. Each walk removes a known fact about a state.
_MOST_TURNS = 16


@dataclass(slots=True)
class Scope:
    """The names visible in a graph or function. `attributes`: of the function call, for the nodes of a function."""

    opsets: Mapping[str, int]
    values: dict[str, Value] = field(default_factory=dict)
    outer: Scope | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    depth: int = 0
    # The names of the enclosing nodes, for messages; "" in the main graph.
    path: str = ""
    # The output names of the enclosing nodes, which identify nodes with equal names.
    node_id: tuple[tuple[str, ...], ...] = ()

    def find(self, name: str) -> Value:
        scope: Scope | None = self
        while scope is not None:
            if (value := scope.values.get(name)) is not None:
                return value
            scope = scope.outer
        return Unknown(f"nothing makes {name!r}")


@dataclass(frozen=True, slots=True)
class ControlFlow:
    """A use of one of these operators. `run` walks a graph and returns its outputs. `name`: for messages; not unique.
    `node_id`: the output names of the enclosing nodes and its own; unique."""

    call: OperatorCall
    scope: Scope
    run: Callable[[onnx.GraphProto, Scope], list[Value]]
    name: str
    node_id: tuple[tuple[str, ...], ...]

    def outputs(self) -> Sequence[Value]:
        if self.call.operator == "If":
            return self._if()
        made = self.call.symbols.made
        states = self._loop() if self.call.operator == "Loop" else self._scan()
        return [_after(value, made, self.call.symbols) for value in states]

    def _if(self) -> Sequence[Value]:
        condition = self.call.inputs[0]
        if condition is None or not condition.independent:
            raise NotProvenError("its condition depends on the rows")
        known = None if condition.values is None else condition.values.flat[0]
        names = ["then_branch", "else_branch"]
        if isinstance(known, bool):
            names.remove("else_branch" if known else "then_branch")
        first, *others = [self._walk(self.call.attributes[branch], {}) for branch in names]
        for other in others:
            first = self._joined_all(first, other)
        return first

    def _loop(self) -> Sequence[Value]:
        """Inputs: trip count, condition and states. Inputs of the body: iteration number, condition and states."""
        count, condition, *initial = self.call.inputs
        if any(one is not None and not one.independent for one in (count, condition)):
            raise NotProvenError("how often it runs depends on the rows")
        body = self.call.attributes["body"]

        def turn(states: Sequence[Value]) -> Sequence[Value]:
            goes_on, *rest = self._walk(body, _named(body, [Tensor(()), Tensor(()), *states]))
            if isinstance(goes_on, Unknown):
                raise NotProvenError(f"its condition depends on the rows: {goes_on.reason}")
            if not goes_on.independent:
                raise NotProvenError("its condition depends on the rows")
            return rest

        states, stacked = self._settled(turn, initial)
        return [*states, *(_stacked(value, 0, self.call.symbols) for value in stacked)]

    def _scan(self) -> Sequence[Value]:
        """Inputs: states, and tensors that are scanned. The body gets one slice of each per iteration."""
        if self.call.opset < 9:
            raise NotProvenError("there is no rule for it before opset 9")
        body = self.call.attributes["body"]
        count = int(self.call.attributes["num_scan_inputs"])
        initial, scanned = self.call.inputs[:-count], self.call.inputs[-count:]
        axes = self.call.attribute("scan_input_axes") or [0] * count
        slices = [_slice(tensor, axis) for tensor, axis in zip(scanned, axes, strict=True)]

        def turn(states: Sequence[Value]) -> Sequence[Value]:
            return self._walk(body, _named(body, [*states, *slices]))

        states, stacked = self._settled(turn, initial)
        axes = self.call.attribute("scan_output_axes") or [0] * len(stacked)
        return [*states, *(_stacked(value, at, self.call.symbols) for value, at in zip(stacked, axes, strict=True))]

    def _walk(self, graph: onnx.GraphProto, values: dict[str, Value]) -> list[Value]:
        scope = self.scope
        path = f"{self.name}, "
        return self.run(
            graph, Scope(scope.opsets, values, scope, scope.attributes, scope.depth + 1, path, self.node_id)
        )

    def _settled(
        self, turn: Callable[[Sequence[Value]], Sequence[Value]], initial: Sequence[Tensor | None]
    ) -> tuple[list[Value], list[Value]]:
        """The facts that hold for the states before and after every turn, and those of the other outputs of a turn."""
        states = [Unknown(f"{self.name}: a state is missing") if one is None else one for one in initial]
        for _ in range(_MOST_TURNS):
            made = turn(states)
            joined = self._joined_all(states, made)
            if all(_same(before, after) for before, after in zip(states, joined, strict=True)):
                return states, list(made[len(states) :])
            states = joined
        raise NotProvenError("what is known of its states does not settle")

    def _joined_all(self, ones: Sequence[Value], others: Sequence[Value]) -> list[Value]:
        return [self._joined(one, other, index) for index, (one, other) in enumerate(zip(ones, others, strict=False))]

    def _joined(self, one: Value, other: Value, index: int) -> Value:
        if isinstance(one, Unknown):
            return one
        if isinstance(other, Unknown):
            return other
        output = f"{self.name}: output {index}"
        if one.rows != other.rows or {one.content, other.content} != {Content.OWN}:
            return Unknown(f"{output} has rows only sometimes, or along another axis")
        same_values = (
            one.values is not None
            and other.values is not None
            and one.values.shape == other.values.shape
            and bool((one.values == other.values).all())
        )
        if not same_values and (one.counts_rows or other.counts_rows):
            return Unknown(f"{output} has the number of rows as a value")
        if one.shape is None or other.shape is None or len(one.shape) != len(other.shape):
            return Tensor(None) if one.rows is None else Unknown(f"{output} has several shapes")
        shape = tuple(
            size if size == another else self.call.symbols.size(("joined", self.node_id, index, axis))
            for axis, (size, another) in enumerate(zip(one.shape, other.shape, strict=True))
        )
        return Tensor(shape, one.rows, one.values if same_values else None)


def _named(body: onnx.GraphProto, values: Sequence[Value]) -> dict[str, Value]:
    return {one.name: value for one, value in zip(body.input, values, strict=True)}


def _same(one: Value, other: Value) -> bool:
    if isinstance(one, Unknown) or isinstance(other, Unknown):
        return isinstance(one, Unknown) and isinstance(other, Unknown)
    values = (one.values is None) == (other.values is None)
    return values and (one.shape, one.rows, one.below) == (other.shape, other.rows, other.below)


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
    return without(shape, tensor.rows, [axis])


def _stacked(value: Value, axis: int, symbols: Symbols) -> Value:
    """The values of all turns, stacked along a new axis."""
    if isinstance(value, Unknown):
        return value
    if value.counts_rows or value.content is not Content.OWN:
        return Unknown("a loop collects numbers of rows")
    if value.shape is None:
        return Tensor(None)
    return inserted(value, value.shape, from_front(axis, len(value.shape) + 1), symbols.size())
