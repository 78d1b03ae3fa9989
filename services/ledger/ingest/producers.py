"""Marks of producers: which batch of each is the newest that was written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from services.ledger.ingest.batch import Producer, UsageBatch
from services.ledger.storage.database import Connection


class BatchFate(Enum):
    """What becomes of a batch."""

    WRITE = "write"
    DUPLICATE = "duplicate"
    GAP = "gap"
    # The number is taken by a batch with other bytes: two processes use one producer.
    CONFLICT = "conflict"


@dataclass(slots=True)
class Mark:
    """Of one producer, as it is in the transaction that holds it. `digests`: of its batches, as far as they matter."""

    id: int
    last: int
    digests: dict[int, bytes]
    dropped_records: int = 0
    dropped_requests: int = 0
    changed: bool = False

    def judge(self, batch: UsageBatch) -> BatchFate:
        """Advances for a batch that is to be written."""
        if batch.sequence == self.last + 1:
            self.last, self.changed = batch.sequence, True
            self.digests[batch.sequence] = batch.digest
            self.dropped_records += batch.dropped_records
            self.dropped_requests += batch.dropped_requests
            return BatchFate.WRITE
        if batch.sequence > self.last:
            return BatchFate.GAP
        # Of a time whose digests are not kept, or were not yet: a router sends again what it cannot know was written.
        return (
            BatchFate.DUPLICATE
            if self.digests.get(batch.sequence, batch.digest) == batch.digest
            else BatchFate.CONFLICT
        )


async def locked(connection: Connection, batches: Sequence[UsageBatch]) -> dict[Producer, Mark]:
    """The marks of who sent `batches`, held until the transaction ends; those of new producers are made."""
    wanted = sorted({batch.producer for batch in batches})
    columns = list(zip(*wanted, strict=True))
    await connection.execute(
        "INSERT INTO producer (router_id, start_epoch) SELECT * FROM unnest($1::text[], $2::bigint[]) AS n(r, e) "
        "WHERE NOT EXISTS (SELECT FROM producer p WHERE p.router_id = n.r AND p.start_epoch = n.e)",
        *columns,
    )
    rows = await connection.fetch(
        "SELECT p.* FROM producer p JOIN unnest($1::text[], $2::bigint[]) AS n(r, e) "
        "ON p.router_id = n.r AND p.start_epoch = n.e ORDER BY p.id FOR UPDATE OF p",
        *columns,
    )
    marks = {
        Producer(row["router_id"], row["start_epoch"]): Mark(row["id"], row["last"], {row["last"]: row["digest"]})
        for row in rows
    }
    if earlier := [batch for batch in batches if batch.sequence < marks[batch.producer].last]:
        by_id = {mark.id: mark for mark in marks.values()}
        rows = await connection.fetch(
            "SELECT d.producer, d.sequence, d.digest FROM batch_digest d "
            "JOIN unnest($1::integer[], $2::bigint[]) AS n(p, s) ON d.producer = n.p AND d.sequence = n.s",
            [marks[batch.producer].id for batch in earlier],
            [batch.sequence for batch in earlier],
        )
        for row in rows:
            by_id[row["producer"]].digests[row["sequence"]] = row["digest"]
    return marks


async def advance(connection: Connection, marks: Iterable[Mark]) -> None:
    """Writes what `judge` changed."""
    changed = [mark for mark in marks if mark.changed]
    await connection.execute(
        "UPDATE producer p SET last = n.last, digest = n.digest, seen = now(), "
        "dropped_records = p.dropped_records + n.records, dropped_requests = p.dropped_requests + n.requests "
        "FROM unnest($1::integer[], $2::bigint[], $3::bytea[], $4::bigint[], $5::bigint[]) "
        "AS n(id, last, digest, records, requests) WHERE p.id = n.id",
        [mark.id for mark in changed],
        [mark.last for mark in changed],
        [mark.digests[mark.last] for mark in changed],
        [mark.dropped_records for mark in changed],
        [mark.dropped_requests for mark in changed],
    )


async def remember(connection: Connection, written: Iterable[tuple[int, UsageBatch]], at: datetime) -> None:
    """Keeps the digests of batches, each with its producer's number; the day's partition is there."""
    columns = zip(*((producer, batch.sequence, batch.digest) for producer, batch in written), strict=True)
    await connection.execute(
        "INSERT INTO batch_digest (at, producer, sequence, digest) "
        "SELECT $1, * FROM unnest($2::integer[], $3::bigint[], $4::bytea[])",
        at,
        *map(list, columns),
    )
