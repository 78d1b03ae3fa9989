"""How requests ended, and which of them count as hits or errors."""

from __future__ import annotations

from typing import NamedTuple

from services.ledger.storage.database import Connection


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


class KindNumbers(NamedTuple):
    """Numbers of the kinds that count as hits, and of those that count as errors."""

    hits: list[int]
    errors: list[int]


async def numbers(connection: Connection) -> KindNumbers:
    """Of all kinds, for queries: which of them count as what is said in `UsageKind` alone."""
    rows = await connection.fetch("SELECT id, outcome, status FROM kind")
    kinds = {row["id"]: UsageKind(row["outcome"], row["status"]) for row in rows}
    return KindNumbers(
        [number for number, kind in kinds.items() if kind.is_hit],
        [number for number, kind in kinds.items() if kind.is_error],
    )
