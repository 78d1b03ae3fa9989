"""Batches as they are read."""

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from ringmesh.ledger.v1 import ledger_pb2

from router.accounting.usage_batch import Dimension
from services.ledger.ingest import batch as batches
from services.ledger.storage.kinds import UsageKind
from services.runtime.errors import InvalidArgumentError
from tests.usage_records import UsageRecord, encode

HIT = Dimension("t", "m", "1", "eu", "cpu", "hit-local", "OK")
MISS = Dimension("t", "m", "1", "eu", "cpu", "miss", "OK")
NOW = 1_796_000_000_000


def request(data, **fields):
    told = {"router_id": "r", "start_epoch": 1, "sequence": 1, "batch": data, "digest": blake3(data).digest(16)}
    return ledger_pb2.AppendRequest(**(told | fields))


def changed(**fields):
    """A batch with these fields in place of its own."""
    message = ledger_pb2.Batch.FromString(encode([UsageRecord(HIT, NOW, 2), UsageRecord(MISS, NOW)]))
    for name, value in fields.items():
        message.ClearField(name)
        if isinstance(value, int | bytes):
            setattr(message, name, value)
        else:
            getattr(message, name).extend(value)
    return message.SerializeToString()


records = st.lists(
    st.builds(
        UsageRecord,
        st.sampled_from([HIT, MISS, MISS._replace(tenant="другой", status="INTERNAL", outcome="")]),
        st.integers(NOW, NOW + 10**9),
        st.integers(1, 10**6),
        *[st.integers(0, 10**9)] * 12,
        st.binary(min_size=16, max_size=16) | st.just(b""),
    ),
    max_size=30,
)


@given(records)
def test_what_routers_write_is_what_ledgers_read(sent):
    read = batches.read(request(encode(sent)))
    found = [
        UsageRecord(
            Dimension(*read.series[place], *read.kinds[place]),
            int(at),
            **{name: int(read.columns[name][number]) for name in batches.COLUMNS},
            trace_id=read.trace_ids[16 * number : 16 * number + 16],
        )
        for number, (place, at) in enumerate(zip(read.dimension, read.at_ms, strict=True))
    ]
    assert found == [record._replace(trace_id=record.trace_id or bytes(16)) for record in sent]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"format": 0}, "format is not set"),
        ({"at_ms": [NOW, 5]}, "record 1: at_ms is 5, which is no time"),
        ({"at_ms": [NOW]}, "dimension has 2 entries for 1 records"),
        ({"dimension": [0, 7]}, "record 1: dimension is 7 of 2"),
        ({"requests": [1, 10**10]}, "record 1: requests is 10000000000; at most 1000000000"),
        ({"compute_us": [1]}, "compute_us has 1 entries for 2 records"),
        ({"compute_us": [1, 10**14]}, "record 1: compute_us is 100000000000000; at most"),
        ({"compute_us": [1, (1 << 64) - 1]}, "compute_us holds 18446744073709551615, which is too large"),
        ({"trace_ids": b"short"}, "trace_ids has 5 bytes for 2 records"),
        ({"dimensions": [ledger_pb2.Dimension(status="OK", tenant="a\0b")]}, "has control characters"),
        ({"dimensions": [ledger_pb2.Dimension(status="OK", model="x" * 257)]}, "has 257 characters"),
        ({"dimensions": [ledger_pb2.Dimension(status="FINE")]}, "'FINE' is no name of a gRPC status"),
        ({"worker_times": [ledger_pb2.WorkerTime(minute=NOW // 60_000)]}, "worker_id is empty"),
        ({"worker_times": [ledger_pb2.WorkerTime(worker_id="w", minute=1)]}, "not the 60 seconds of a minute"),
        ({"worker_times": [ledger_pb2.WorkerTime(worker_id="w", minute=NOW // 60_000, seconds=1 << 60)]}, "not the 60"),
        ({"dropped_requests": 10**14}, "dropped_requests is 100000000000000"),
    ],
)
def test_what_is_wrong_is_named(fields, complaint):
    if "dimensions" in fields:
        fields["dimensions"] *= 2
    with pytest.raises(InvalidArgumentError, match=complaint):
        batches.read(request(changed(**fields)))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"router_id": ""}, "router_id is empty"),
        ({"router_id": "x" * 300}, "router_id has 300 characters"),
        ({"sequence": 0}, "sequence is 0; it starts at 1"),
        ({"start_epoch": 0}, "start_epoch is 0"),
        ({"sequence": 1 << 63}, "sequence is"),
    ],
)
def test_a_producer_that_is_none_is_refused(fields, complaint):
    with pytest.raises(InvalidArgumentError, match=complaint):
        batches.read(request(changed(), **fields))


def test_too_many_records_are_refused():
    many = [UsageRecord(HIT, NOW)] * (batches.MOST_RECORDS + 1)
    with pytest.raises(InvalidArgumentError, match="has 50001 records"):
        batches.read(request(encode(many)))


def test_outcomes_of_newer_routers_are_other():
    read = batches.read(request(encode([UsageRecord(MISS._replace(outcome="hit-quantum"), NOW)])))
    assert read.kinds == (UsageKind("other", "OK"),)
    assert not read.kinds[0].is_hit


def test_joined_requests_are_hits_and_failed_ones_are_not():
    assert UsageKind("joined", "OK").is_hit
    assert not UsageKind("joined", "UNAVAILABLE").is_hit
    assert UsageKind("joined", "UNAVAILABLE").is_error


def sample(**fields):
    told = {"model": "m", "below": 16, "key": 15 << 56 | 7, "at_ms": NOW, "requests": 3, "compute_us": 5}
    return ledger_pb2.KeySample(**(told | fields))


def test_samples_of_keys_are_read():
    kept = sample(key=255 << 56, below=256, value_bytes=9, cacheable=True, version="1", region="eu", worker_type="cpu")
    first, second = batches.read(request(encode([], key_samples=[sample(), kept]))).key_samples
    assert first == (("", "m", "", "", ""), NOW, 15 << 56 | 7, 16, False, 3, 5, 0)
    # Signed, as PostgreSQL has it.
    assert second == (("", "m", "1", "eu", "cpu"), NOW, -1 << 56, 256, True, 3, 5, 9)


@pytest.mark.parametrize(
    "fields",
    [
        {"below": 0},
        {"below": 257},
        {"below": 15},
        {"requests": 0},
        {"requests": 1 << 60},
        {"compute_us": 1 << 60},
        {"value_bytes": 1 << 60},
        {"at_ms": 5},
        {"model": "m" * 300},
        {"region": "\n"},
    ],
)
def test_a_sample_that_is_none_is_refused(fields):
    with pytest.raises(InvalidArgumentError, match=r"batch.key_samples\[0\]|no sample of a key"):
        batches.read(request(encode([], key_samples=[sample(**fields)])))


def test_too_many_samples_are_refused():
    with pytest.raises(InvalidArgumentError, match="20001 key samples; at most 20000"):
        batches.read(request(encode([], key_samples=[sample()] * 20_001)))
