"""The answer to whether something may be done."""

from __future__ import annotations  # compiled by mypyc

from typing import Final


class Verdict:
    """True unless there is a `reason` against it."""

    def __init__(self, reason: str = "") -> None:
        self.reason = reason

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return f"no: {self.reason}" if self.reason else "yes"


YES: Final = Verdict()
