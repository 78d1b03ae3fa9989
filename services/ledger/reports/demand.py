"""What was computed, request by request, and which workers were up: what advice is replayed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.ledger.reports.time_range import TimeRange
from services.ledger.storage.database import Connection
from services.ledger.storage.times import HOUR_MS, MINUTE_MS, milliseconds

# Of all hours together. Beyond, an hour stands for itself by its busiest minutes.
_MOST_REQUESTS = 200_000
_COUNTS = (
    "SELECT at, sum(requests - hits)::bigint FROM margin_minute m JOIN margin s ON s.id = m.series "
    "WHERE at >= $1 AND at < $2 AND s.cube = 'region' AND ($3 = '' OR s.worker_type = $3) GROUP BY 1"
)
_REQUESTS = (
    "SELECT (extract(epoch FROM u.at) * 1000000)::bigint - u.total_us, s.model || '/' || s.version, s.worker_type, "
    "u.compute_us, greatest(u.batch_requests, 1), u.queue_us + u.run_us FROM usage u JOIN series s ON s.id = u.series "
    "WHERE u.at >= $1 AND u.at < $2 AND u.compute_us > 0 AND ($3 = '' OR s.worker_type = $3) ORDER BY 1 LIMIT $4"
)
_UP = (
    "SELECT m.at, w.worker_type, sum(bit_count(m.seconds::bit(64)))::bigint * 1000000 FROM worker_minute m "
    "JOIN worker w ON w.id = m.worker WHERE m.at >= $1 AND m.at < $2 GROUP BY 1, 2"
)


class Request(NamedTuple):
    """One that was computed: in a run of `batch`, of which it was charged `compute_us`. Latency: it waited and ran."""

    arrived_us: int
    model: str
    worker_type: str
    compute_us: int
    batch: int
    latency_us: int


@dataclass(frozen=True, slots=True)
class Hour:
    """An hour, or the part of one that is in a range, with the requests of `window`, its busiest minutes or all.

    `paid_us`: for how long workers of each type were up in the hour, and `up_us` in the window.
    """

    span: TimeRange
    window: TimeRange
    requests: Sequence[Request]
    paid_us: dict[str, int]
    up_us: dict[str, int]

    @property
    def span_us(self) -> int:
        return (self.span.until_ms - self.span.from_ms) * 1000

    @property
    def window_us(self) -> int:
        return (self.window.until_ms - self.window.from_ms) * 1000


async def fetch(connection: Connection, range_: TimeRange, worker_type: str) -> list[Hour]:
    """The hours of a range of whole minutes; of one worker type, or "" for all."""
    counts = {milliseconds(row[0]): row[1] for row in await connection.fetch(_COUNTS, *range_.times, worker_type)}
    up = [(milliseconds(row[0]), row[1], row[2]) for row in await connection.fetch(_UP, *range_.times)]
    spans = [
        TimeRange(max(begin, range_.from_ms), min(begin + HOUR_MS, range_.until_ms))
        for begin in range(range_.from_ms // HOUR_MS * HOUR_MS, range_.until_ms, HOUR_MS)
    ]
    hours = []
    for span in spans:
        window = busiest(span, counts, _MOST_REQUESTS // len(spans))
        rows = await connection.fetch(_REQUESTS, *window.times, worker_type, _MOST_REQUESTS // len(spans))
        requests = [Request(*row) for row in rows]
        hours.append(Hour(span, window, requests, _up_in(span, up, worker_type), _up_in(window, up, worker_type)))
    return hours


def busiest(span: TimeRange, counts: dict[int, int], most: int) -> TimeRange:
    """The whole span, or as many minutes around its busiest one as have `most` requests together."""
    minutes = range(span.from_ms, span.until_ms, MINUTE_MS)
    first = max(minutes, key=lambda minute: counts.get(minute, 0))
    end, total = first + MINUTE_MS, counts.get(first, 0)
    while first > span.from_ms or end < span.until_ms:
        before = counts.get(first - MINUTE_MS, 0) if first > span.from_ms else -1
        after = counts.get(end, 0) if end < span.until_ms else -1
        total += max(before, after)
        if total > most:
            break
        if before > after:
            first -= MINUTE_MS
        else:
            end += MINUTE_MS
    return TimeRange(first, end)


def _up_in(range_: TimeRange, up: Sequence[tuple[int, str, int]], wanted: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for at_ms, worker_type, us in up:
        if range_.from_ms <= at_ms < range_.until_ms and wanted in ("", worker_type):
            found[worker_type] = found.get(worker_type, 0) + us
    return found
