"""The result of the prover."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason`: why rows are not proven independent, naming node, operator and axis; "" if they are."""

    reason: str

    @property
    def proven(self) -> bool:
        """Whether each row of the outputs depends on its own row of the inputs only."""
        return not self.reason
