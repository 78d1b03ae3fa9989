"""The names visible in a graph or function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.inference.execution.batch_proof.abstract_value import Unknown, Value


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
