"""The answer to whether something may be done."""

from __future__ import annotations  # compiled by mypyc

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """True unless there is a `reason` against it."""

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return f"no: {self.reason}" if self.reason else "yes"


YES = Verdict()
