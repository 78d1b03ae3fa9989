"""Usage records one by one, for tests of what takes batches."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ringmesh.ledger.v1 import ledger_pb2

from router.accounting import usage_batch
from router.accounting.usage_batch import NOTHING, Dimension, UsageColumns


class UsageRecord(NamedTuple):
    """A request, or several hits that were folded: all else is the sum over them. `trace_id` has 16 bytes, or none."""

    dimension: Dimension
    at_ms: int
    requests: int = 1
    total_us: int = 0
    router_us: int = 0
    cache_us: int = 0
    queue_us: int = 0
    run_us: int = 0
    compute_us: int = 0
    saved_us: int = 0
    batch_requests: int = 0
    batch_rows: int = 0
    rows: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    trace_id: bytes = b""


def encode(
    records: Sequence[UsageRecord],
    worker_times: Iterable[ledger_pb2.WorkerTime] = (),
    dropped_records: int = 0,
    dropped_requests: int = 0,
    key_samples: Iterable[ledger_pb2.KeySample] = (),
) -> bytes:
    """A serialized Batch."""
    return usage_batch.encode(_columns(records), worker_times, dropped_records, dropped_requests, key_samples)


def _columns(records: Sequence[UsageRecord]) -> UsageColumns:
    if not records:
        return NOTHING
    dimensions, *columns, trace_ids = zip(*records, strict=True)
    numbers = {dimension: number for number, dimension in enumerate(dict.fromkeys(dimensions))}
    return UsageColumns([*numbers], [numbers[dimension] for dimension in dimensions], columns, trace_ids)
