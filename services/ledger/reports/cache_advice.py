"""Of what size the cache would save most, and which models it would be worth caching, from a sample of the keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports.miss_ratio import Curve, LookUp
from services.ledger.reports.rating import Rating
from services.ledger.reports.time_range import TimeRange
from services.ledger.storage import kinds
from services.ledger.storage.database import Connection
from services.ledger.storage.times import HOUR_MS, utc

# Samples that are replayed: beyond, keys below a lower threshold.
_MOST_SAMPLES = 200_000
# What an entry takes beside its value, as the local tier of a router counts.
_ENTRY_BYTES = 350
_LEAST_BYTES = 1 << 20
_SIZES = 24
# Repeated requests below which a model is too rarely used to advise on.
_LEAST_HITS = 100
_GB: Final = 10**9
_SAMPLES = (
    "SELECT k.at, k.key, s.model || '/' || s.version AS model, s.worker_type, k.cacheable, k.requests, k.compute_us, "
    "k.value_bytes FROM key_sample k JOIN series s ON s.id = k.series "
    "WHERE k.at >= $1 AND k.at < $2 AND k.key >> 48 < $3 AND ($4 = '' OR s.worker_type = $4) ORDER BY k.at, k.key"
)
_ASKED = (
    "SELECT s.model || '/' || s.version AS model, k.outcome <> 'bypass' AS cacheable, s.worker_type, "
    "sum(u.requests)::bigint AS requests, sum(u.saved_us)::bigint AS saved_us, "
    "coalesce(sum(u.requests) FILTER (WHERE u.kind = ANY($4)), 0)::bigint AS hits "
    "FROM usage u JOIN series s ON s.id = u.series "
    "JOIN kind k ON k.id = u.kind WHERE u.at >= $1 AND u.at < $2 AND k.status = 'OK' "
    "AND ($3 = '' OR s.worker_type = $3) GROUP BY 1, 2, 3"
)


class CacheAdvice:
    """Of one range, whose worker types have the prices of the first hour of `rating`.

    `memory_nano`: of 10**9 bytes for an hour.
    """

    def __init__(self, range_: TimeRange, rating: Rating, memory_nano: int) -> None:
        self._range = range_
        self._rating = rating
        self._memory_nano = memory_nano
        self._share = 1.0
        self._samples: Sequence[Any] = ()
        self._asked: Sequence[Any] = ()

    async def fetch(self, connection: Connection, worker_type: str) -> None:
        """Reads what `advise` replays."""
        begin, end = self._range.times
        below, count = await connection.fetchrow(
            "SELECT coalesce(min(k.below), 256), count(*) FROM key_sample k JOIN series s ON s.id = k.series "
            "WHERE k.at >= $1 AND k.at < $2 AND ($3 = '' OR s.worker_type = $3)",
            begin,
            end,
            worker_type,
        )
        # Of 65,536: a set of keys below a threshold holds those below a lower one.
        threshold = below * 256 if count <= _MOST_SAMPLES else max(1, below * 256 * _MOST_SAMPLES // count)
        self._share = threshold / 65536
        self._samples = await connection.fetch(_SAMPLES, begin, end, threshold, worker_type)
        hits = (await kinds.numbers(connection)).hits
        self._asked = await connection.fetch(_ASKED, begin, end, worker_type, hits)

    def advise(self) -> tuple[list[ledger_pb2.CacheSize], list[ledger_pb2.Recommendation]]:
        """By size, and what to do. On a thread: it takes seconds."""
        sizes, advised = self._size()
        return sizes, advised + self._models()

    def _size(self) -> tuple[list[ledger_pb2.CacheSize], list[ledger_pb2.Recommendation]]:
        samples = [one for one in self._samples if one["cacheable"]]
        asked = [one for one in self._asked if one["cacheable"]]
        requests = sum(one["requests"] for one in asked)
        if not samples or not requests:
            return [], []
        curve = self._curve(samples, requests)
        sizes = [self._at(curve, size) for size in _sizes(curve)]
        best = max(sizes, key=lambda size: (size.saved_nano - size.memory_nano, -size.bytes))
        half = self._halves(samples, requests)
        # The size that the first half of the time advises, and what it hits in the second.
        chosen = max(_sizes(half[0]), key=lambda size: (self._net(half[0], size), -size))
        expected, measured = (curve.hit_ratio(chosen) for curve in half)
        saved = sum(self._rating.rated(one["worker_type"], 0, one["saved_us"]) for one in asked)
        had = self._rating.nano(saved)
        advice = ledger_pb2.Recommendation(
            kind=ledger_pb2.Recommendation.KIND_CACHE_SIZE,
            subjects=[],
            advice=f"keep {_size_text(best.bytes)} of answers",
            evidence=f"{len(samples):,} look-ups of a sample of {self._share:.2%} of the keys replayed: a "
            f"least-recently-used cache of that size answers {best.hit_ratio:.1%} of {requests:,} requests, one "
            f"without a bound {curve.hit_ratio(curve.bytes):.1%} with {_size_text(curve.bytes)}; "
            f"{sum(one['hits'] for one in asked) / requests:.1%} were measured",
            saved_nano=best.saved_nano - best.memory_nano - had,
        )
        if measured:
            advice.error = abs(expected - measured) / measured
        return sizes, [advice]

    def _models(self) -> list[ledger_pb2.Recommendation]:
        """Those that are not cached, though their requests repeat."""
        found = []
        for model in sorted({one["model"] for one in self._samples if not one["cacheable"]}):
            samples = [one for one in self._samples if one["model"] == model and not one["cacheable"]]
            requests = sum(one["requests"] for one in self._asked if one["model"] == model and not one["cacheable"])
            curve = self._curve(samples, requests)
            hits, net = curve.hits(curve.bytes), self._net(curve, curve.bytes)
            if hits < _LEAST_HITS or net <= 0:
                continue
            first, second = (half.hit_ratio(half.bytes) for half in self._halves(samples, requests))
            advice = ledger_pb2.Recommendation(
                kind=ledger_pb2.Recommendation.KIND_CACHE,
                subjects=[model],
                advice="cache its answers, if equal requests may get equal ones; `ringmesh explain` says why it is not",
                evidence=f"of {requests:,} requests, {curve.hit_ratio(curve.bytes):.1%} repeat one to the same router "
                f"byte for byte; all answers have {_size_text(curve.bytes)}",
                saved_nano=net,
            )
            if second:
                advice.error = abs(first - second) / second
            found.append(advice)
        return found

    def _halves(self, samples: Sequence[Any], requests: int) -> list[Curve]:
        """The curves of both halves of the time, each from an empty cache."""
        middle = utc((self._range.from_ms + self._range.until_ms) / 2)
        parts = (
            [one for one in samples if one["at"] < middle],
            [one for one in samples if one["at"] >= middle],
        )
        counts = [sum(one["requests"] for one in part) for part in parts]
        return [
            self._curve(part, round(requests * count / sum(counts))) for part, count in zip(parts, counts, strict=True)
        ]

    def _curve(self, samples: Sequence[Any], requests: int) -> Curve:
        look_ups = [
            LookUp(
                (one["model"], one["key"]),
                one["value_bytes"] + _ENTRY_BYTES,
                one["requests"],
                self._rating.rated(one["worker_type"], 0, one["compute_us"]),
            )
            for one in samples
        ]
        return Curve(look_ups, self._share, requests)

    def _at(self, curve: Curve, size: int) -> ledger_pb2.CacheSize:
        return ledger_pb2.CacheSize(
            bytes=size,
            hit_ratio=curve.hit_ratio(size),
            saved_nano=self._rating.nano(curve.value(size)),
            memory_nano=self._memory(size),
        )

    def _net(self, curve: Curve, size: int) -> int:
        return self._rating.nano(curve.value(size)) - self._memory(size)

    def _memory(self, size: int) -> int:
        return size * self._memory_nano * (self._range.until_ms - self._range.from_ms) // (_GB * HOUR_MS)


def _sizes(curve: Curve) -> list[int]:
    """Doubling, up to the first that holds all answers."""
    sizes = [size := _LEAST_BYTES]
    while size < curve.bytes and len(sizes) < _SIZES:
        sizes.append(size := 2 * size)
    return [size for size in sizes if size >= curve.least_bytes] or sizes[-1:]


def _size_text(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
