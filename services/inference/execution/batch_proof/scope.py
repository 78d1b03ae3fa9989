"""The names that a graph or function sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.inference.execution.batch_proof.abstract_value import Unknown, Value


@dataclass(slots=True)
class Scope:
    """The names that a graph or function sees. `attributes`: those of the call, for a function's nodes."""

    opsets: Mapping[str, int]
    values: dict[str, Value] = field(default_factory=dict)
    outer: Scope | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    depth: int = 0
    # "" or the way to here, of nodes' names.
    path: str = ""
    # The outputs of the nodes on the way, which tell apart those of one name.
    place: tuple[tuple[str, ...], ...] = ()

    def find(self, name: str) -> Value:
        """Of this graph, or of the graphs around it."""
        scope: Scope | None = self
        while scope is not None:
            if (value := scope.values.get(name)) is not None:
                return value
            scope = scope.outer
        return Unknown(f"nothing makes {name!r}")

    def inner(self, path: str, place: tuple[tuple[str, ...], ...]) -> Scope:
        """Of a graph within this one."""
        return Scope(self.opsets, {}, self, self.attributes, self.depth + 1, path, place)
