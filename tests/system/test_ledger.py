"""The ledger over gRPC, on its embedded PostgreSQL. Tests share it, each with tenants and worker types of its own."""

import asyncio
import csv
import heapq
import io
import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from random import Random
from urllib.parse import quote

import asyncpg
import grpc
import pyarrow.parquet
import pytest
from blake3 import blake3
from ringmesh.ledger.v1 import ledger_pb2

from router.accounting.ledger_sender import LedgerSender
from router.accounting.ledger_spool import LedgerSpool
from services.ledger.reports.miss_ratio import Curve, LookUp
from services.ledger.storage import database
from services.runtime.errors import UnavailableError
from tests.public_trace import public_trace
from tests.system import processes
from tests.system.conftest import RINGMESH, eventually
from tests.system.ledgers import (
    DAY_MS,
    DUPLICATE,
    GAP,
    HOUR_MS,
    WRITTEN,
    Ledger,
    Sender,
    hits,
    miss,
    now_ms,
    unique,
    worker_time,
)
from tests.usage_records import encode


@pytest.fixture(scope="module")
def cache():
    started = processes.start("cache")
    yield started
    processes.kill(started)


@pytest.fixture(scope="module")
def ledger(cache):
    ledger = Ledger(cache_address=cache.address, metrics_address=processes.free_address())
    yield ledger
    ledger.stop()


@pytest.fixture
def sender(ledger):
    return Sender(ledger)


@pytest.fixture
def tenant():
    return unique("tenant")


def total(ledger, tenant, **question):
    return ledger.report("tenant", tenant=tenant, **question).total


def test_what_a_batch_holds_is_what_a_report_says(ledger, sender, tenant):
    sender.append([miss(tenant, compute_us=1500), hits(tenant, 40, saved_us=60_000, total_us=2400, request_bytes=99)])
    answer = ledger.report("tenant", tenant=tenant)
    (row,) = answer.rows
    assert (row.tenant, row.requests, row.hits, row.errors) == (tenant, 41, 40, 0)
    assert (row.compute_us, row.saved_us, row.total_us, row.request_bytes) == (1500, 60_000, 2400, 99)
    assert row.cost_nano == 15  # 1.5 ms at 0.00001 a second
    assert row.saved_nano == 600
    assert answer.currency == "USD"


def test_a_batch_that_is_sent_again_counts_once(ledger, sender, tenant):
    records = [miss(tenant)]
    assert sender.append(records, sequence=1).result == WRITTEN
    for _ in range(3):
        again = sender.append(records, sequence=1)
        assert (again.result, again.last_sequence) == (DUPLICATE, 1)
    assert total(ledger, tenant).requests == 1


def test_a_gap_is_refused_and_says_what_is_missing(ledger, sender, tenant):
    sender.append([miss(tenant)], sequence=1)
    gap = sender.append([miss(tenant)], sequence=3)
    assert (gap.result, gap.last_sequence) == (GAP, 1)
    assert total(ledger, tenant).requests == 1
    assert sender.append([miss(tenant)], sequence=2).result == WRITTEN
    assert sender.append([miss(tenant)], sequence=3).result == WRITTEN
    assert total(ledger, tenant).requests == 3


def test_a_first_batch_that_is_not_number_one_is_a_gap(ledger, sender, tenant):
    assert sender.append([miss(tenant)], sequence=2).result == GAP
    assert total(ledger, tenant).requests == 0


def test_two_lives_of_a_router_count_apart(ledger, tenant):
    router_id = unique("router")
    for epoch in (5, 3):
        assert Sender(ledger, router_id, epoch).append([miss(tenant)]).result == WRITTEN
    assert total(ledger, tenant).requests == 2


def test_two_routers_that_use_one_producer_are_told(ledger, tenant):
    router_id = unique("router")
    Sender(ledger, router_id).append([miss(tenant)])
    with pytest.raises(grpc.RpcError) as refused:
        Sender(ledger, router_id).append([miss(tenant, compute_us=7)])
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "another process uses this producer; start a new epoch" in refused.value.details()
    assert total(ledger, tenant).requests == 1


def test_a_router_that_is_far_behind_another_of_its_id_is_told(ledger, tenant):
    router_id = unique("router")
    one, other = Sender(ledger, router_id), Sender(ledger, router_id)
    batches = [encode([miss(tenant, compute_us=number)]) for number in range(1, 6)]
    for batch in batches:
        one.append((), batch=batch)
    # What they have in common, as after a clone, is counted once.
    for number in (1, 2):
        assert other.append((), sequence=number, batch=batches[number - 1]).result == DUPLICATE
    with pytest.raises(grpc.RpcError, match="another process uses this producer; start a new epoch"):
        other.append([miss(tenant, compute_us=7)], sequence=3)
    assert total(ledger, tenant).requests == 5


async def test_of_routers_that_were_cloned_nothing_is_lost_or_counted_twice(ledger, tenant, tmp_path):
    """Their clocks are behind the epoch that they were cloned in, so that the next one of each is the same."""
    spool = LedgerSpool(tmp_path / "original", 1 << 30, lambda: 1000)
    spool.open()
    for _ in range(3):
        spool.append(encode([miss(tenant)]), 1, 1)
    spool.close()
    senders = []
    for number in range(3):
        shutil.copytree(tmp_path / "original", tmp_path / f"clone {number}")
        spool = LedgerSpool(tmp_path / f"clone {number}", 1 << 30, lambda: 1)
        spool.open()
        senders.append(LedgerSender(spool, ledger.started.address))
    assert len({(sender.router_id, sender.epoch) for sender in senders}) == 1
    for number, sender in enumerate(senders):
        for _ in range(10 + number):
            await sender.submit(encode([miss(tenant)]), 1, 1)
    senders[0].start()
    await senders[0].close(60)
    for sender in senders[1:]:
        sender.start()
    for sender in senders[1:]:
        await sender.close(60)
        assert sender.is_idle
        assert sender.dropped_requests == 0
    assert len({sender.router_id for sender in senders}) == 3
    assert total(ledger, tenant).requests == 3 + 10 + 11 + 12


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda batch: batch[:-1], "is damaged"),
        (lambda batch: batch[:40] + bytes([batch[40] ^ 1]) + batch[41:], "is damaged"),
        (lambda _: b"", "is damaged"),
    ],
    ids=["truncated", "a bit flipped", "empty"],
)
def test_a_damaged_batch_is_refused_and_the_whole_one_taken(ledger, sender, tenant, damage, complaint):
    batch = encode([miss(tenant)])
    with pytest.raises(grpc.RpcError) as refused:
        sender.append((), batch=damage(batch), digest=blake3(batch).digest(16))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert complaint in refused.value.details()
    assert sender.append((), batch=batch).result == WRITTEN
    assert total(ledger, tenant).requests == 1


def test_what_is_no_batch_is_refused(ledger, sender):
    with pytest.raises(grpc.RpcError, match="is not a serialized Batch"):
        sender.append((), batch=b"\xff\xff\xff")


def test_a_batch_of_a_newer_format_is_kept_by_the_router(ledger, sender, tenant):
    batch = ledger_pb2.Batch.FromString(encode([miss(tenant)]))
    batch.format = 2
    with pytest.raises(grpc.RpcError) as refused:
        sender.append((), batch=batch.SerializeToString())
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "upgrade it first" in refused.value.details()


def test_columns_that_an_older_router_does_not_know_are_zero(ledger, sender, tenant):
    batch = ledger_pb2.Batch.FromString(encode([miss(tenant, router_us=9, rows=3, trace_id=b"t" * 16)]))
    for name in ("router_us", "rows", "trace_ids"):
        batch.ClearField(name)
    sender.append((), batch=batch.SerializeToString())
    found = total(ledger, tenant)
    assert (found.requests, found.compute_us, found.router_us) == (1, 1000, 0)


def test_records_of_a_clock_that_was_set_back_are_counted_at_their_time(ledger, sender, tenant):
    hour_ago = now_ms() - HOUR_MS - 60_000
    sender.append([miss(tenant), miss(tenant, at_ms=hour_ago)])
    assert total(ledger, tenant).requests == 1
    assert total(ledger, tenant, from_ms=hour_ago).requests == 2


def test_records_of_a_time_that_is_not_kept_are_counted_when_they_come(ledger, sender, tenant):
    sender.append([miss(tenant, at_ms=now_ms() - 400 * DAY_MS), miss(tenant, at_ms=now_ms() + 400 * DAY_MS)])
    assert total(ledger, tenant).requests == 2


def test_late_records_find_a_partition(ledger, sender, tenant):
    at_ms = now_ms() - 20 * DAY_MS
    sender.append([miss(tenant, at_ms=at_ms)])
    (row,) = ledger.report("day", tenant=tenant, from_ms=now_ms() - 30 * DAY_MS).rows
    assert (row.day, row.requests) == (f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d}", 1)


def test_dropped_requests_are_counted_under_their_batch(ledger, sender, tenant):
    assert sender.append([], dropped_records=2, dropped_requests=50).result == WRITTEN
    assert sender.append([miss(tenant)]).result == WRITTEN
    text = metrics(ledger)
    assert int(float(text["ringmesh_ledger_dropped_requests_total"])) >= 50


def test_rows_add_up_to_the_total_to_the_nano(ledger, sender, tenant):
    price(ledger, kind := unique("type"), hourly_nano=1_000_000_007)
    sender.append([miss(tenant, compute_us=333, model=f"m{number}", worker_type=kind) for number in range(100)])
    answer = ledger.report("model", tenant=tenant)
    assert len(answer.rows) == 100
    assert sum(row.cost_nano for row in answer.rows) == answer.total.cost_nano
    assert answer.total.cost_nano == round(33_300 * 1_000_000_007 / 3.6e9)


def test_rows_beyond_the_limit_are_in_the_total(ledger, sender, tenant):
    sender.append([miss(tenant, compute_us=1000 * number, model=f"m{number}") for number in range(1, 6)])
    answer = ledger.report("model", tenant=tenant, limit=2)
    assert [row.model for row in answer.rows] == ["m5", "m4"]
    assert (answer.row_count, answer.total.requests) == (5, 5)


def test_errors_cost_what_they_computed(ledger, sender, tenant):
    sender.append([miss(tenant, compute_us=300_000, status="INTERNAL"), miss(tenant, compute_us=100_000)])
    found = total(ledger, tenant)
    assert (found.errors, found.error_us, found.cost_nano, found.error_nano) == (1, 300_000, 4000, 3000)


def test_a_price_that_changes_is_used_from_then_on(ledger, sender, tenant):
    kind = unique("type")
    change = now_ms() // HOUR_MS * HOUR_MS - HOUR_MS
    price(ledger, kind, until_ms=change, hourly_nano=3_600_000_000)
    price(ledger, kind, from_ms=change, hourly_nano=7_200_000_000)
    sender.append(
        [miss(tenant, at_ms=at, worker_type=kind, compute_us=1_000_000) for at in (change - 1, change, change + 1)]
    )
    answer = ledger.report("tenant", tenant=tenant, from_ms=change - HOUR_MS)
    assert answer.total.cost_nano == 1_000_000 + 2 * 2_000_000


def test_the_past_is_rated_again_when_its_price_changes(ledger, sender, tenant):
    price(ledger, kind := unique("type"), hourly_nano=3_600_000_000)
    sender.append([miss(tenant, worker_type=kind, compute_us=1_000_000)])
    assert total(ledger, tenant).cost_nano == 1_000_000
    price(ledger, kind, hourly_nano=36_000_000_000, supersede=True)
    assert total(ledger, tenant).cost_nano == 10_000_000


def test_energy_that_was_measured_is_added_to_the_hourly_price(ledger, sender, tenant):
    kind = unique("type")
    # 250 W at 0.40 a kWh are 0.10 an hour.
    price(ledger, kind, hourly_nano=900_000_000, power_milliwatts=250_000, energy_nano_per_kwh=400_000_000)
    sender.append([miss(tenant, worker_type=kind, compute_us=3_600_000_000)])
    assert total(ledger, tenant).cost_nano == 1_000_000_000


def test_a_missing_price_is_an_error_that_names_it(ledger, sender, tenant):
    kind = unique("type")
    sender.append([miss(tenant, worker_type=kind)])
    with pytest.raises(grpc.RpcError) as refused:
        total(ledger, tenant)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert f"no price for worker type '{kind}' from " in refused.value.details()
    answer = ledger.report("tenant", tenant=tenant, allow_unpriced=True)
    assert (answer.total.requests, answer.total.cost_nano) == (1, 0)
    assert "it is not in the cost" in answer.warnings[0]
    price(ledger, kind)
    assert total(ledger, tenant).requests == 1


@pytest.mark.parametrize(
    ("wrong", "code", "complaint"),
    [
        ({"hourly_nano": -1}, "INVALID_ARGUMENT", "hourly_nano is -1; it is 0 to"),
        ({"currency": "XXY"}, "INVALID_ARGUMENT", "'XXY' is no currency of ISO 4217"),
        ({"currency": "EUR"}, "INVALID_ARGUMENT", "the price is in EUR, and this ledger counts in USD"),
        ({"from_ms": HOUR_MS + 1}, "INVALID_ARGUMENT", "from_ms is not a whole hour"),
        ({"from_ms": 2 * HOUR_MS, "until_ms": HOUR_MS}, "INVALID_ARGUMENT", "ends after it begins"),
        ({"slots": 5000}, "INVALID_ARGUMENT", "slots is 5000"),
        ({"worker_type": ""}, "INVALID_ARGUMENT", "worker_type has 1 to 256"),
        ({"worker_type": "cpu"}, "ALREADY_EXISTS", "'cpu' has a price from the beginning, which overlaps"),
    ],
)
def test_a_price_that_is_wrong_changes_nothing(ledger, wrong, code, complaint):
    before = ledger.stub.ListPrices(ledger_pb2.ListPricesRequest())
    with pytest.raises(grpc.RpcError) as refused:
        price(ledger, **{"worker_type": unique("type"), **wrong})
    assert refused.value.code().name == code
    assert complaint in refused.value.details()
    assert ledger.stub.ListPrices(ledger_pb2.ListPricesRequest()) == before


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"from_ms": 0}, "a report covers at most 1100"),
        ({"from_ms": now_ms() + DAY_MS}, "is empty"),
        ({"limit": 100_000}, "at most 10000"),
        ({"trace_id": "xyz"}, "is no trace id"),
        ({"from_ms": 1 << 62, "until_ms": (1 << 62) + DAY_MS}, "from_ms is 4611686018427387904, which is no time"),
        ({"until_ms": (1 << 64) - 1}, "until_ms is 18446744073709551615, which is no time"),
    ],
)
def test_a_report_that_is_wrong_gets_a_clear_error(ledger, wrong, complaint):
    with pytest.raises(grpc.RpcError) as refused:
        ledger.report("tenant", **wrong)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert complaint in refused.value.details()


def test_requests_and_idle_time_are_the_bill(ledger, sender, tenant):
    kind, region = unique("type"), unique("region")
    price(ledger, kind, hourly_nano=1_234_567_891)
    hour = now_ms() // HOUR_MS * HOUR_MS
    # One worker for an hour less 10 s, seen by two routers; 1/3 s of it was used, thrice.
    minutes = [
        worker_time("w", hour // 60_000 + minute, (1 << 60) - 1 if minute else (1 << 50) - 1, kind, region)
        for minute in range(60)
    ]
    Sender(ledger).append([], worker_times=minutes)
    sender.append(
        [miss(tenant, hour + 1, compute_us=333_333, worker_type=kind, region=region)] * 3, worker_times=minutes[::-1]
    )
    bill = ledger.stub.Bill(ledger_pb2.BillRequest(from_ms=hour, until_ms=hour + HOUR_MS, allow_unpriced=True))
    row = next(row for row in bill.rows if row.worker_type == kind)
    assert (row.region, row.paid_us, row.used_us) == (region, 3590_000_000, 999_999)
    assert row.idle_us == row.paid_us - row.used_us
    assert row.requests_nano + row.idle_nano == row.bill_nano
    # Within the rounding of all rows, what 3590 s cost.
    assert abs(row.bill_nano - 3590 * 1_234_567_891 / 3600) <= 1
    for name in ("requests_nano", "idle_nano", "bill_nano", "paid_us", "used_us", "idle_us"):
        assert sum(getattr(row, name) for row in bill.rows) == getattr(bill.total, name)
    assert bill.total.requests_nano + bill.total.idle_nano == bill.total.bill_nano


def test_seconds_of_workers_that_come_after_an_outage_of_days_are_billed_once(ledger, tenant):
    price(ledger, kind := unique("type"), hourly_nano=3600)
    hour = (now_ms() - 20 * DAY_MS) // HOUR_MS * HOUR_MS
    for seconds in (0b0111, 0b1110):
        told = worker_time(f"w-{kind}", hour // 60_000, seconds, kind)
        assert Sender(ledger).append([], worker_times=[told]).result == WRITTEN
    bill = ledger.stub.Bill(ledger_pb2.BillRequest(from_ms=hour, until_ms=hour + HOUR_MS, allow_unpriced=True))
    (row,) = [row for row in bill.rows if row.worker_type == kind]
    assert (row.paid_us, row.idle_us, row.bill_nano) == (4_000_000, 4_000_000, 4)


def test_a_price_with_slots_is_for_as_many_runs_at_once(ledger, sender, tenant):
    price(ledger, kind := unique("type"), hourly_nano=3_600_000_000, slots=4)
    hour = now_ms() // HOUR_MS * HOUR_MS
    sender.append(
        [miss(tenant, hour, compute_us=100_000_000, worker_type=kind)],
        worker_times=[worker_time("w", hour // 60_000, worker_type=kind)],
    )
    bill = ledger.stub.Bill(ledger_pb2.BillRequest(from_ms=hour, allow_unpriced=True))
    row = next(row for row in bill.rows if row.worker_type == kind)
    assert (row.paid_us, row.idle_us) == (240_000_000, 140_000_000)
    assert (row.requests_nano, row.idle_nano) == (25_000_000, 35_000_000)


def test_more_compute_than_workers_were_up_for_is_billed_and_told(ledger, sender, tenant):
    price(ledger, kind := unique("type"), hourly_nano=3_600_000_000)
    sender.append([miss(tenant, compute_us=5_000_000, worker_type=kind)])
    bill = ledger.stub.Bill(ledger_pb2.BillRequest(from_ms=now_ms() - HOUR_MS, allow_unpriced=True))
    row = next(row for row in bill.rows if row.worker_type == kind)
    assert (row.bill_nano, row.idle_nano) == (5_000_000, 0)
    assert any(kind in warning and "5.0 s more" in warning for warning in bill.warnings)


def test_a_request_is_found_by_its_trace(ledger, sender, tenant):
    trace = bytes.fromhex(f"{hash(tenant) % (1 << 64):016x}") + b"\xee" * 8
    sender.append([miss(tenant, compute_us=200_000, run_us=400_000, batch_requests=2, trace_id=trace), miss(tenant)])
    for asked in (trace.hex(), trace.hex()[:12]):
        (row,) = ledger.report(from_ms=0, trace_id=asked).rows
        assert row.request.trace_id == trace.hex()
        assert (row.tenant, row.cost_nano, row.request.run_us, row.request.batch_requests) == (tenant, 2000, 400_000, 2)
        assert (row.request.outcome, row.request.status) == ("miss", "OK")


def test_single_requests_of_an_hour_are_listed_by_cost(ledger, sender, tenant):
    sender.append([miss(tenant, compute_us=us) for us in (1000, 3000, 2000)])
    rows = ledger.report("request", tenant=tenant, limit=2).rows
    assert [row.compute_us for row in rows] == [3000, 2000]
    with pytest.raises(grpc.RpcError, match="listed for at most an hour"):
        ledger.report("request", from_ms=now_ms() - DAY_MS)


def test_changes_put_the_largest_first(ledger, sender, tenant):
    until = now_ms() // HOUR_MS * HOUR_MS
    for model, before, after in (("same", 900_000, 900_000), ("gone", 500_000, 0), ("new", 0, 700_000)):
        for us, at in ((before, until - HOUR_MS - 1), (after, until - 1)):
            if us:
                sender.append([miss(tenant, at, us, model)])
    rows = ledger.report("model", tenant=tenant, from_ms=until - HOUR_MS, until_ms=until, changes=True).rows
    assert [(row.model, row.previous_cost_nano, row.cost_nano) for row in rows] == [
        ("new", 0, 7000),
        ("gone", 5000, 0),
        ("same", 9000, 9000),
    ]


def test_the_same_question_is_answered_from_the_cache_until_its_roll_up_changes(ledger, sender, tenant):
    sender.append([miss(tenant)])
    question = {"tenant": tenant, "from_ms": now_ms() - HOUR_MS, "until_ms": now_ms() + HOUR_MS}
    answers = [ledger.report("tenant", **question)]
    assert not answers[0].cached
    # Answers are stored in the background, and a cache that was slow to answer is not asked for a second.
    eventually(lambda: answers.append(ledger.report("tenant", **question)) or answers[-1].cached)
    assert answers[0].rows == answers[-1].rows
    sender.append([miss(tenant)])
    third = ledger.report("tenant", **question)
    assert (third.cached, third.total.requests) == (False, 2)


def test_a_day_that_is_rebuilt_says_the_same(ledger, sender, tenant):
    at_ms = now_ms() - 10 * DAY_MS
    sender.append([miss(tenant, at_ms, status="INTERNAL"), hits(tenant, 7, at_ms, saved_us=70), miss(tenant, at_ms)])
    question = {"tenant": tenant, "from_ms": at_ms - DAY_MS, "until_ms": at_ms + DAY_MS}
    before = ledger.report("model", **question)
    day = f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d}"
    rebuilt = ledger.stub.Rebuild(ledger_pb2.RebuildRequest(day=day))
    assert rebuilt.requests >= 9
    after = ledger.report("model", **question)
    assert not after.cached
    assert after.rows == before.rows


@pytest.mark.parametrize("day", ["0001-01-01", "9999-01-01", "yesterday"])
def test_a_day_that_is_not_kept_is_not_rebuilt(ledger, day):
    with pytest.raises(grpc.RpcError) as refused:
        ledger.stub.Rebuild(ledger_pb2.RebuildRequest(day=day))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("form", ["CSV", "PARQUET"])
def test_an_export_has_every_record(ledger, sender, tenant, form):
    begin = now_ms() - 5 * DAY_MS
    trace = b"\x12" * 16
    records = [hits(tenant, 3, begin), miss(tenant, begin + 1, compute_us=77, trace_id=trace)]
    sender.append(records)
    request = ledger_pb2.ExportRequest(
        from_ms=begin, until_ms=begin + 2, format=ledger_pb2.ExportRequest.Format.Value(f"FORMAT_{form}")
    )
    data = b"".join(answer.part for answer in ledger.stub.Export(request, timeout=60))
    if form == "CSV":
        rows = [row for row in csv.DictReader(io.StringIO(data.decode())) if row["tenant"] == tenant]
    else:
        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
        rows = [row for row in rows if row["tenant"] == tenant]
    assert [(row["outcome"], int(row["requests"]), int(row["compute_us"]), row["trace_id"]) for row in rows] == [
        ("hit-local", 3, 0, ""),
        ("miss", 1, 77, trace.hex()),
    ]


def test_a_forecast_goes_on_as_the_last_days_did(ledger, sender):
    answer = ledger.stub.Forecast(ledger_pb2.ForecastRequest())
    assert answer.month == f"{datetime.now(UTC):%Y-%m}"
    assert answer.low_nano <= answer.expected_nano <= answer.high_nano
    assert answer.spent_nano <= answer.low_nano


def test_the_command_line_says_what_the_ledger_says(ledger, sender, tenant):
    sender.append([miss(tenant, compute_us=1500), hits(tenant, 40, saved_us=60_000)])
    command = [*RINGMESH, "cost", "--ledger", ledger.started.address, "--tenant", tenant]
    told = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True, timeout=120).stdout)
    (row,) = told["rows"]
    shown = {name: row[name] for name in ("tenant", "requests", "compute_us", "cost_nano", "saved_nano")}
    assert shown == {"tenant": tenant, "requests": 41, "compute_us": 1500, "cost_nano": 15, "saved_nano": 600}
    table = subprocess.run(command, capture_output=True, check=True, timeout=120, text=True).stdout
    assert tenant in table
    assert "0.000000015" in table


def price(ledger, worker_type, *, supersede=False, currency="USD", hourly_nano=3_600_000_000, **rest):
    told = ledger_pb2.Price(worker_type=worker_type, currency=currency, hourly_nano=hourly_nano, **rest)
    ledger.stub.SetPrice(ledger_pb2.SetPriceRequest(price=told, supersede=supersede), timeout=60)


def metrics(ledger):
    import urllib.request

    text = urllib.request.urlopen(f"http://{ledger.settings['metrics_address']}/metrics").read().decode()
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def advise(ledger, kind, hour, **question):
    request = ledger_pb2.AdviseRequest(worker_type=kind, from_ms=hour, until_ms=hour + HOUR_MS, **question)
    return ledger.stub.Advise(request)


def advised(answer, kind):
    (found,) = [one for one in answer.recommendations if one.kind == ledger_pb2.Recommendation.Kind.Value(kind)]
    return found


@pytest.fixture
def kind(ledger):
    """A worker type of its own, at one unit an hour."""
    name = unique("type")
    price(ledger, name, hourly_nano=1_000_000_000)
    return name


@pytest.fixture
def hour():
    """Two hours ago."""
    return now_ms() // HOUR_MS * HOUR_MS - 2 * HOUR_MS


def up(hour, workers, kind):
    return [worker_time(f"w{n}", hour // 60_000 + m, worker_type=kind) for n in range(workers) for m in range(60)]


def test_advice_replays_an_hour_and_says_by_how_much_it_is_off(ledger, sender, tenant, kind, hour):
    # Four workers were up; two at a time is what comes: pairs of runs of 100 ms, every 3 seconds.
    run = {"compute_us": 100_000, "run_us": 100_000, "total_us": 100_000, "worker_type": kind}
    records = [miss(tenant, hour + 3000 * number + 100, **run) for number in range(1000) for _ in range(2)]
    sender.append(records, worker_times=up(hour, 4, kind))
    answer = advise(ledger, kind, hour, latency_us=150_000)
    (line,) = answer.hours
    assert (line.requests, line.workers) == (2000, 4.0)
    assert (line.measured_latency_us, line.replayed_latency_us) == (100_000, 100_000)
    assert (line.advised_workers, line.advised_latency_us) == (2, 100_000)
    assert (line.cost_nano, line.advised_cost_nano) == (4 * 10**9, 2 * 10**9)
    workers = advised(answer, "KIND_WORKERS")
    assert (workers.saved_nano, workers.error, [*workers.subjects]) == (2 * 10**9, 0, [kind])
    assert workers.advice.startswith(f"workers of type {kind}: 2 from ")
    assert workers.evidence.startswith("2,000 computed requests replayed")
    (line,) = advise(ledger, kind, hour, latency_us=200_000).hours
    assert (line.advised_workers, line.advised_latency_us) == (1, 200_000)
    answer = advise(ledger, kind, hour, latency_us=50_000)
    assert "mlp/1 alone take longer than 50 ms" in answer.warnings[0]
    with pytest.raises(grpc.RpcError, match="replays at most 48 hours"):
        ledger.stub.Advise(ledger_pb2.AdviseRequest(worker_type=kind, from_ms=hour - 60 * HOUR_MS))
    with pytest.raises(grpc.RpcError, match="memory_gb_hour_nano is 0 or more"):
        advise(ledger, kind, hour, memory_gb_hour_nano=-1)


def test_models_that_come_at_different_times_should_share_workers(ledger, sender, tenant, kind, hour):
    run = {"compute_us": 900_000, "run_us": 900_000, "total_us": 900_000, "worker_type": kind}
    records = [
        miss(tenant, hour + 3000 * number + 1000 * place + 1000, model=f"model-{place}", **run)
        for number in range(1000)
        for place in range(3)
    ]
    sender.append(records, worker_times=up(hour, 3, kind))
    share = advised(advise(ledger, kind, hour, latency_us=1_000_000), "KIND_SHARE")
    assert [*share.subjects] == ["model-0/1", "model-1/1", "model-2/1"]
    assert (share.saved_nano, share.error) == (2 * 10**9, 0)
    assert "1 is enough for them together, and 3 if each has its own" in share.evidence


def test_a_model_with_a_costly_run_should_run_in_larger_batches(ledger, sender, tenant, kind, hour):
    # A run takes 80 ms, and 1 ms a request; 32 requests at a time come every second, and run by two.
    records = [
        miss(tenant, hour + 1000 * number + 1000, compute_us=share, worker_type=kind, total_us=999_000, **run)
        for number in range(500)
        for share, run, count in (
            (41_000, {"run_us": 82_000, "queue_us": 500_000, "batch_requests": 2}, 30),
            (81_000, {"run_us": 81_000, "queue_us": 500_000, "batch_requests": 1}, 2),
        )
        for _ in range(count)
    ]
    for start in range(0, len(records), 8000):
        sender.append(records[start : start + 8000], worker_times=up(hour, 2, kind))
    batch = advised(advise(ledger, kind, hour, latency_us=10_000_000), "KIND_BATCH")
    assert (batch.advice, [*batch.subjects]) == (f"let up to 16 of its requests run together on {kind}", ["mlp/1"])
    assert "a run takes 80.00 ms and 1.00 ms a request" in batch.evidence
    assert batch.saved_nano > 0
    assert batch.error < 0.01


def key_sample(kind, at_ms, key, **fields):
    told = {"model": "mlp", "version": "1", "worker_type": kind, "below": 256, "requests": 1, "compute_us": 10_000_000}
    told |= {"cacheable": True, "value_bytes": 1 << 20}
    return ledger_pb2.KeySample(at_ms=at_ms, key=key, **(told | fields))


def test_the_size_of_the_cache_is_where_more_memory_costs_more_than_it_saves(ledger, sender, tenant, kind, hour):
    # Ten answers of a MiB in turn, and as many that come once: the last twenty hold each that comes again.
    samples = [
        key_sample(kind, hour + 1000 * (10 * turn + place), key)
        for turn in range(100)
        for place in range(10)
        for key in (place, 1000 + 10 * turn + place)
    ]
    sender.append([miss(tenant, hour + 5, worker_type=kind, requests=2000)], key_samples=samples)
    answer = advise(ledger, kind, hour, memory_gb_hour_nano=10**6)
    by_size = {size.bytes >> 20: size for size in answer.cache_sizes}
    assert by_size[16].hit_ratio == 0
    assert by_size[32].hit_ratio == pytest.approx(990 / 2000)
    assert by_size[32].saved_nano == 990 * 10 * 10**9 // 3600
    assert by_size[32].memory_nano == (32 << 20) * 10**6 // 10**9
    cache = advised(answer, "KIND_CACHE_SIZE")
    assert cache.advice == "keep 32.0 MiB of answers"
    assert cache.saved_nano == by_size[32].saved_nano - by_size[32].memory_nano
    assert cache.error == pytest.approx(0)
    assert "answers 49.5% of 2,000 requests" in cache.evidence
    # Where memory costs more than it saves, the smallest.
    dear = advised(advise(ledger, kind, hour, memory_gb_hour_nano=10**13), "KIND_CACHE_SIZE")
    assert dear.advice == "keep 1.0 MiB of answers"


def test_a_model_whose_requests_repeat_uncached_should_be_cached(ledger, sender, tenant, kind, hour):
    samples = [
        key_sample(kind, hour + 1000 * number, number % 50, cacheable=False, model=f"bypass-{kind}")
        for number in range(1000)
    ]
    bypass = miss(tenant, hour + 5, worker_type=kind, requests=1000, model=f"bypass-{kind}")
    bypass = bypass._replace(dimension=bypass.dimension._replace(outcome="bypass"))
    sender.append([bypass], key_samples=samples)
    cache = advised(advise(ledger, kind, hour), "KIND_CACHE")
    assert [*cache.subjects] == [f"bypass-{kind}/1"]
    assert "of 1,000 requests, 95.0% repeat one" in cache.evidence
    assert cache.saved_nano == pytest.approx(950 * 10 * 10**9 / 3600)
    assert cache.error == pytest.approx(0)


@pytest.mark.proof
def test_advice_on_an_hour_of_a_public_service_says_how_far_it_is_off(ledger, sender, tenant, kind, hour):
    """Each block of an input is a look-up; what was not seen before is computed, 10 ms a block, on four workers."""
    seen, free, samples, records, look_ups = set(), [0] * 4, {}, [], []
    for at_ms, blocks in public_trace():
        new = [block for block in blocks if block not in seen]
        seen.update(new)
        look_ups += [LookUp(block, 1_000_350) for block in blocks]
        arrived = hour + at_ms
        for block in blocks:
            digest = blake3(b"%d" % block).digest()
            if digest[0] < 16:
                key = int.from_bytes(digest[:8], "big")
                told = {"below": 16, "value_bytes": 1_000_000, "compute_us": 10_000}
                samples.setdefault(at_ms, []).append(key_sample(kind, arrived, key, **told))
        if new:
            start = max(arrived, free[0])
            heapq.heapreplace(free, start + 10 * len(new))
            us = {"compute_us": 10_000 * len(new), "run_us": 10_000 * len(new)}
            waited = {"queue_us": 1000 * (start - arrived), "total_us": 1000 * (start - arrived) + us["run_us"]}
            ended = start + 10 * len(new)
            records.append(miss(tenant, ended, worker_type=kind, requests=len(new), **us, **waited))
        records.append(hits(tenant, len(blocks) - len(new), arrived, worker_type=kind))
    sender.append(records, key_samples=[one for found in samples.values() for one in found][:20_000])
    sender.append([], worker_times=up(hour, 4, kind))
    answer = advise(ledger, kind, hour, latency_us=10_000_000, memory_gb_hour_nano=10**6)
    cache, workers = advised(answer, "KIND_CACHE_SIZE"), advised(answer, "KIND_WORKERS")
    exact = Curve(look_ups)
    for size in answer.cache_sizes:
        assert size.hit_ratio == pytest.approx(exact.hit_ratio(size.bytes), abs=0.03)
    (line,) = answer.hours
    print(cache, workers, line)
    assert cache.error < 0.3
    assert workers.error < 0.5
    assert line.replayed_latency_us == pytest.approx(line.measured_latency_us, rel=0.01)


def test_the_command_line_shows_advice(ledger, sender, tenant, kind, hour):
    sender.append([miss(tenant, hour + 5, worker_type=kind)], worker_times=up(hour, 2, kind))
    begin = f"{datetime.fromtimestamp(hour / 1000, UTC):%Y-%m-%dT%H:%M}"
    command = [*RINGMESH, "advice", "--ledger", ledger.started.address, "--worker-type", kind, "--since", begin]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert f"{kind}: workers of type {kind}: 1 from" in shown
    told = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True, timeout=120).stdout)
    assert told["recommendations"][0]["kind"] == ledger_pb2.Recommendation.KIND_WORKERS
    assert told["hours"][0]["requests"] == 1


def test_exports_that_nobody_reads_hold_up_neither_batches_nor_reports(ledger, sender, tenant):
    begin = now_ms() - 7 * DAY_MS
    for _ in range(4):
        sender.append([miss(tenant, begin, trace_id=bytes(range(16)))] * 50_000)
    request = ledger_pb2.ExportRequest(from_ms=begin, until_ms=begin + 1, format=ledger_pb2.ExportRequest.FORMAT_CSV)
    exports = [ledger.stub.Export(request) for _ in range(8)]
    codes = []
    for export in exports:
        try:
            assert next(export).part
        except grpc.RpcError as error:
            codes.append(error.code().name)
    # One of a day without a partition yet.
    assert sender.append([miss(tenant), miss(tenant, now_ms() - 33 * DAY_MS)]).result == WRITTEN
    assert total(ledger, tenant).requests == 1
    assert codes == ["RESOURCE_EXHAUSTED"] * 5
    for export in exports:
        export.cancel()

    def is_exported():
        with suppress(grpc.RpcError):
            return b"".join(answer.part for answer in ledger.stub.Export(request, timeout=60))

    eventually(is_exported, 60)


@pytest.mark.proof
def test_ledgers_that_share_a_cache_answer_from_their_own_database(cache, tenant):
    begin = now_ms() - 2 * DAY_MS
    question = {"tenant": tenant, "from_ms": begin - DAY_MS, "until_ms": begin + HOUR_MS}
    for requests in (1, 2):
        one = Ledger(cache_address=cache.address)
        Sender(one).append([hits(tenant, requests, begin)])
        answers = [one.report("tenant", **question)]
        eventually(
            lambda one=one, answers=answers: answers.append(one.report("tenant", **question)) or answers[-1].cached
        )
        assert [answer.total.requests for answer in (answers[0], answers[-1])] == [requests] * 2
        one.stop()


def test_a_batch_whose_names_no_index_takes_holds_up_no_other(ledger, sender, tenant):
    random = Random(7)
    names = ["".join(chr(random.randrange(0x10000, 0x2FFFF)) for _ in range(256)) for _ in range(4)]
    long = miss(tenant, model=names[0], region=names[1], worker_type=names[2])
    long = long._replace(dimension=long.dimension._replace(version=names[3]))
    with pytest.raises(grpc.RpcError) as refused:
        Sender(ledger).append([long])
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "the batch cannot be written" in refused.value.details()
    assert sender.append([miss(tenant)]).result == WRITTEN


def test_the_last_days_are_shown_where_there_are_more(ledger, sender, tenant):
    sender.append([miss(tenant, now_ms() - days * DAY_MS) for days in range(30)])
    answer = ledger.report("day", tenant=tenant, from_ms=now_ms() - 29 * DAY_MS, limit=20)
    days = [f"{datetime.fromtimestamp(now_ms() / 1000 - days * 86400, UTC):%Y-%m-%d}" for days in range(20)]
    assert [row.day for row in answer.rows] == days[::-1]
    assert (answer.row_count, answer.total.requests) == (30, 30)


def test_bills_and_lists_of_requests_are_cached_until_their_day_changes(ledger, sender, tenant, kind):
    hour = now_ms() // HOUR_MS * HOUR_MS - 5 * DAY_MS
    Sender(ledger).append([miss(tenant, hour + 7, compute_us=1_000_000, worker_type=kind)])
    range_ = {"from_ms": hour, "until_ms": hour + HOUR_MS}

    def bill():
        return ledger.stub.Bill(ledger_pb2.BillRequest(**range_, allow_unpriced=True))

    def requests():
        return ledger.report("request", tenant=tenant, **range_)

    for ask in (bill, requests):
        first = ask()
        answers = [first]
        eventually(lambda ask=ask, answers=answers: answers.append(ask()) or answers[-1].cached)
        assert answers[-1].rows == first.rows
    sender.append([miss(tenant, hour + 9, compute_us=2_000_000, worker_type=kind)])
    assert len(requests().rows) == 2
    assert next(row.used_us for row in bill().rows if row.worker_type == kind) == 3_000_000
    # Of a day whose seconds are kept, workers that were up make another bill.
    range_ = {"from_ms": hour + 4 * DAY_MS, "until_ms": hour + 4 * DAY_MS + HOUR_MS}
    assert not [row for row in bill().rows if row.worker_type == kind]
    sender.append([], worker_times=[worker_time("w", range_["from_ms"] // 60_000, worker_type=kind)])
    assert next(row.paid_us for row in bill().rows if row.worker_type == kind) == 60_000_000


def test_what_was_computed_in_another_region_is_billed_once(ledger, sender, tenant, kind, hour):
    sender.append(
        [miss(tenant, hour + 5, compute_us=10_000_000, worker_type=kind, region="eu")],
        worker_times=[worker_time("w", hour // 60_000, worker_type=kind, region="us")],
    )
    answer = ledger.stub.Bill(ledger_pb2.BillRequest(from_ms=hour, until_ms=hour + HOUR_MS, allow_unpriced=True))
    rows = {row.region: row for row in answer.rows if row.worker_type == kind}
    assert {region: (row.paid_us, row.used_us, row.idle_us) for region, row in rows.items()} == {
        "eu": (0, 10_000_000, 0),
        "us": (60_000_000, 0, 50_000_000),
    }
    assert abs(sum(row.bill_nano for row in rows.values()) - 10**9 // 60) <= 1
    assert not [warning for warning in answer.warnings if kind in warning]


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_transaction_on_a_server_that_answers_no_more_ends(ledger, monkeypatch, is_cancelled):
    monkeypatch.setattr(database, "LONGEST_SECONDS", 0.3)
    folder = ledger.postgres().cwd()
    sessions = database.Database(f"postgresql://ringmesh@/postgres?host={quote(folder, safe='')}", None)
    await sessions.open()
    stopped = []
    waiting = asyncio.Event()

    async def ask():
        async with sessions.changing() as connection:
            stopped.append(await connection.fetchval("SELECT pg_backend_pid()"))
            os.kill(stopped[0], signal.SIGSTOP)
            waiting.set()
            await connection.fetchval("SELECT 1")

    asking = asyncio.create_task(ask())
    try:
        await waiting.wait()
        if is_cancelled:
            asking.cancel()
        with pytest.raises((UnavailableError, asyncio.CancelledError)):
            await asyncio.wait_for(asyncio.shield(asking), 20)
        async with sessions.changing() as connection:
            assert await connection.fetchval("SELECT 1") == 1
    finally:
        os.kill(stopped[0], signal.SIGCONT)
        await sessions.close()


async def test_a_start_on_a_server_that_answers_no_more_ends(ledger, monkeypatch):
    monkeypatch.setattr(database, "LONGEST_SECONDS", 0.3)
    stopped = []

    async def hangs(connection):
        stopped.append(await connection.fetchval("SELECT pg_backend_pid()"))
        os.kill(stopped[0], signal.SIGSTOP)
        await connection.fetchval("SELECT 1")

    monkeypatch.setattr(database, "_is_ours", hangs)
    folder = ledger.postgres().cwd()
    sessions = database.Database(f"postgresql://ringmesh@/postgres?host={quote(folder, safe='')}", None)
    try:
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
            await asyncio.wait_for(sessions.open(), 20)
        monkeypatch.undo()
        await sessions.open()
        assert sessions.is_open
    finally:
        os.kill(stopped[0], signal.SIGCONT)
        await sessions.close()
