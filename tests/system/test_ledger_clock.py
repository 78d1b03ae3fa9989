"""A ledger whose clock is set back one hour: its parts run here by a clock that the test sets, on a real database."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from blake3 import blake3
from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.ingest.batch import read
from services.ledger.ingest.producers import BatchFate
from services.ledger.ingest.writer import Writer
from services.ledger.reports.budgets import BudgetList
from services.ledger.reports.price_list import PriceList
from services.ledger.storage.budget_table import Budget, BudgetKey
from services.ledger.storage.database import Database
from services.ledger.storage.partitions import Partitions, Retention
from services.ledger.storage.times import utc
from tests.system.ledgers import DAY_MS, HOUR_MS, Ledger, miss, now_ms, unique, worker_time
from tests.system.test_ledger_faults import assert_grains_agree, url_of
from tests.unit.clock import Clock
from tests.usage_records import encode

# A ledger to start; what routers do by such a clock is in tests/unit/router/accounting.
pytestmark = pytest.mark.proof

HARD = 8_000_000


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    ledger = Ledger(state_dir=tmp_path_factory.mktemp("ledger"))
    yield ledger
    ledger.stop()


@asynccontextmanager
async def parts(ledger, clock):
    """What a ledger's process is made of, on the database of `ledger`."""
    database = Database(url_of(ledger), None)
    await database.open()
    partitions = Partitions(Retention(usage=35, minutes=3, rollups=1100))
    writer = Writer(database, partitions, clock)
    writer.start()
    budgets = BudgetList(database, PriceList(database, "USD"), clock)
    yield SimpleNamespace(database=database, partitions=partitions, writer=writer, budgets=budgets)
    await writer.close()
    await database.close()


def test_records_and_seconds_of_an_hour_that_comes_twice_are_counted_once(ledger):
    """The hour before midnight, so that the days, their partitions and their versions go back too."""
    tenant, router_id = unique("tenant"), unique("router")
    midnight = (now_ms() // DAY_MS + 1) * DAY_MS
    clock = Clock()

    def batch(sequence):
        at_ms = int(clock.now * 1000)
        up = worker_time("w", at_ms // 60_000, region=tenant)
        data = encode([miss(tenant, at_ms, region=tenant)] * 10, [up])
        digest = blake3(data).digest(16)
        return read(
            ledger_pb2.AppendRequest(router_id=router_id, start_epoch=1, sequence=sequence, batch=data, digest=digest)
        )

    async def count():
        sequence = 0
        async with parts(ledger, clock) as made:
            for minutes in (-70, -10, 10, -50, -10, 5, 10):
                clock.now = midnight / 1000 + minutes * 60
                await made.partitions.prepare(made.database, utc(clock.now * 1000))
                assert not await made.partitions.drop_old(made.database, utc(clock.now * 1000))
                sequence += 1
                sent = batch(sequence)
                assert await made.writer.append(sent) == (BatchFate.WRITE, sequence)
                assert await made.writer.append(sent) == (BatchFate.DUPLICATE, sequence)
            assert not made.writer.counters.moved
        await assert_grains_agree(ledger)

    asyncio.run(count())
    question = {"from_ms": midnight - DAY_MS, "until_ms": midnight + DAY_MS}
    rows = ledger.report("day", tenant=tenant, **question).rows
    assert [row.requests for row in rows] == [40, 30]
    bill = ledger.stub.Bill(ledger_pb2.BillRequest(**question))
    (row,) = [row for row in bill.rows if (row.region, row.worker_type) == (tenant, "cpu")]
    # Of seven minutes that a worker was up, two came twice.
    assert row.paid_us == 5 * 60_000_000


def test_a_lease_of_before_the_clock_was_set_back_is_held_for_no_longer_than_another(ledger):
    tenant = unique("tenant")
    key = BudgetKey(tenant, "", "month")
    # Not where a month begins.
    clock = Clock(now_ms() // (30 * DAY_MS) * 30 * DAY_MS / 1000 + 10 * HOUR_MS / 1000)

    async def lease():
        amounts = []

        async def ask(router):
            answer = await made.budgets.lease(router, 1, {})
            amounts.extend(one.amount_nano for one in answer.leases if one.budget.tenant == tenant)

        async with parts(ledger, clock) as made:
            await made.budgets.set(Budget(key, 0, HARD), "USD")
            await ask("gone")
            clock.now -= 3600
            await ask("other")
            clock.now += 29
            await ask("other")
            clock.now += 2
            await ask("other")
        return amounts

    assert asyncio.run(lease()) == [HARD // 2, HARD // 4, HARD // 4, HARD // 2]
