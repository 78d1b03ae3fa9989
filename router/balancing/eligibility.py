"""The result of a check that something may be used, with the reason if it may not."""

from __future__ import annotations  # compiled by mypyc

from typing import Final


class Eligibility:
    """`ok`, or the `reason` why not."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.ok = not reason


ELIGIBLE: Final = Eligibility("")
