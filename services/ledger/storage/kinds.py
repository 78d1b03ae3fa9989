"""How requests ended, and which of them count as hits or errors."""

from __future__ import annotations

from typing import Final, NamedTuple


class UsageKind(NamedTuple):
    """A row of the table `kind`."""

    outcome: str
    status: str

    @property
    def is_hit(self) -> bool:
        """Answered without a run of its own."""
        return self.status == "OK" and (self.outcome.startswith("hit-") or self.outcome == "joined")

    @property
    def is_error(self) -> bool:
        return self.status != "OK"


# The same in SQL, of the table `kind` as k.
IS_HIT: Final = "(k.status = 'OK' AND (k.outcome LIKE 'hit-%' OR k.outcome = 'joined'))"
IS_ERROR: Final = "(k.status <> 'OK')"
