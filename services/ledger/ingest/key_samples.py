"""Requests for a sample of the keys, as they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from services.ledger.ingest.batch import KeySample, UsageSeries
from services.ledger.storage.database import Connection


async def add(connection: Connection, samples: Sequence[KeySample], numbers: Mapping[UsageSeries, int]) -> None:
    """In the caller's transaction; the partitions are there."""
    if samples:
        series, *columns = zip(*samples, strict=True)
        await connection.execute(
            "INSERT INTO key_sample (series, at, key, below, cacheable, requests, compute_us, value_bytes) "
            "SELECT series, to_timestamp(at / 1000.0), key, below, cacheable, requests, compute_us, value_bytes "
            "FROM unnest($1::integer[], $2::bigint[], $3::bigint[], $4::smallint[], $5::boolean[], $6::bigint[], "
            "$7::bigint[], $8::bigint[]) "
            "AS n(series, at, key, below, cacheable, requests, compute_us, value_bytes)",
            [numbers[one] for one in series],
            *columns,
        )
