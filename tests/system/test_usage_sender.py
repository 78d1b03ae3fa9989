"""What a router spools reaches the ledger once, whatever the ledger says."""

import asyncio
import time

import grpc
import pytest
from ringmesh.ledger.v1 import ledger_pb2, ledger_pb2_grpc

from router.accounting.ledger_sender import LedgerSender
from router.accounting.ledger_spool import LedgerSpool
from tests.system.ledgers import DUPLICATE, GAP, WRITTEN, miss
from tests.usage_records import encode

BATCHES = [encode([miss("t", at_ms=1_796_000_000_000, compute_us=number)]) for number in range(4)]


class Ledger(ledger_pb2_grpc.LedgerServiceServicer):
    """Answers as it is told, in turn, then that the batch is written; keeps what was written."""

    def __init__(self):
        self.script = []
        self.written = []
        self.leases = ledger_pb2.LeaseResponse()

    async def Append(self, request, context):
        answer = self.script.pop(0) if self.script else WRITTEN
        if isinstance(answer, tuple):
            await context.abort(*answer)
        if answer == WRITTEN:
            self.written.append((request.start_epoch, request.sequence, request.batch))
        return ledger_pb2.AppendResponse(result=answer, last_sequence=request.sequence)

    async def Lease(self, _, __):
        return self.leases


@pytest.fixture
async def ledger():
    servicer = Ledger()
    server = grpc.aio.server()
    ledger_pb2_grpc.add_LedgerServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield servicer
    await server.stop(0)


@pytest.fixture
async def sender(ledger, tmp_path):
    spool = LedgerSpool(tmp_path / "spool", 1 << 20, lambda: 1000)
    spool.open()
    sender = LedgerSender(spool, ledger.address)
    sender.spool = spool
    sender.start()
    yield sender
    await sender.close(0)


async def all_sent(sender):
    async with asyncio.timeout(60):
        while len(sender.spool):
            await asyncio.sleep(0.01)


async def submit(sender, *batches):
    for batch in batches:
        await sender.submit(batch, 1, 5)


def dropped(batch):
    return ledger_pb2.Batch.FromString(batch).dropped_requests


async def test_batches_arrive_in_order(ledger, sender):
    await submit(sender, *BATCHES)
    await all_sent(sender)
    assert ledger.written == [(1000, number + 1, batch) for number, batch in enumerate(BATCHES)]
    assert sender.sent == 4


async def test_a_batch_that_left_the_spool_is_counted_as_sent(sender, monkeypatch):
    counted, written = [], sender.spool.written
    monkeypatch.setattr(sender.spool, "written", lambda one: counted.append(sender.sent) or written(one))
    await submit(sender, *BATCHES)
    await all_sent(sender)
    assert counted == [1, 2, 3, 4]


async def test_a_batch_is_sent_again_until_it_is_acknowledged(ledger, sender):
    ledger.script = [(grpc.StatusCode.UNAVAILABLE, "later")] * 2 + [(grpc.StatusCode.RESOURCE_EXHAUSTED, "later")]
    await submit(sender, *BATCHES[:2])
    await all_sent(sender)
    assert [batch for _, _, batch in ledger.written] == BATCHES[:2]
    assert sender.failures == 3


async def test_a_duplicate_is_as_good_as_written(ledger, sender):
    ledger.script = [DUPLICATE]
    await submit(sender, *BATCHES[:2])
    await all_sent(sender)
    assert [(sequence, batch) for _, sequence, batch in ledger.written] == [(2, BATCHES[1])]


async def test_a_batch_that_is_refused_for_good_is_replaced_by_its_counts(ledger, sender):
    ledger.script = [(grpc.StatusCode.INVALID_ARGUMENT, "record 0: at_ms is no time")]
    await submit(sender, *BATCHES[:2])
    await all_sent(sender)
    (_, first, empty), (_, second, batch) = ledger.written
    assert (first, second, batch) == (1, 2, BATCHES[1])
    assert dropped(empty) == 5
    assert sender.spool.dropped_requests == 5


async def test_a_gap_is_answered_by_a_new_epoch_with_all_that_waits(ledger, sender):
    ledger.script = [WRITTEN, GAP]
    await submit(sender, *BATCHES)
    await all_sent(sender)
    assert [batch for _, _, batch in ledger.written] == BATCHES
    epochs = [epoch for epoch, _, _ in ledger.written]
    assert epochs[0] == 1000
    assert len(set(epochs[1:])) == 1
    assert epochs[1] > 1000
    assert [sequence for _, sequence, _ in ledger.written] == [1, 1, 2, 3]


async def test_another_process_of_the_same_name_makes_a_new_epoch(ledger, sender):
    ledger.script = [(grpc.StatusCode.FAILED_PRECONDITION, "written with other bytes; start a new epoch")]
    await submit(sender, *BATCHES[:2])
    await all_sent(sender)
    assert [(sequence, batch) for _, sequence, batch in ledger.written] == [(1, BATCHES[0]), (2, BATCHES[1])]
    assert ledger.written[0][0] > 1000


async def test_a_newer_format_waits_for_the_ledger_to_be_upgraded(ledger, sender):
    ledger.script = [(grpc.StatusCode.FAILED_PRECONDITION, "format 2: upgrade it first")] * 2
    await submit(sender, BATCHES[0])
    await all_sent(sender)
    assert [batch for _, _, batch in ledger.written] == BATCHES[:1]


async def test_what_cannot_be_sent_in_time_stays_for_the_next_life(ledger, tmp_path):
    spool = LedgerSpool(tmp_path / "spool", 1 << 20, time.time_ns)
    spool.open()
    ledger.script = [(grpc.StatusCode.UNAVAILABLE, "down")] * 1000
    sender = LedgerSender(spool, ledger.address)
    sender.start()
    await submit(sender, *BATCHES[:2])
    await sender.close(0.1)
    ledger.script = []
    spool = LedgerSpool(tmp_path / "spool", 1 << 20, time.time_ns)
    spool.open()
    sender = LedgerSender(spool, ledger.address)
    sender.start()
    await sender.close(60)
    assert [batch for _, _, batch in ledger.written] == BATCHES[:2]


async def test_leases_outlive_the_process(ledger, sender, tmp_path):
    budget = ledger_pb2.Budget(tenant="acme", period=ledger_pb2.PERIOD_DAY, hard_nano=10)
    ledger.leases = ledger_pb2.LeaseResponse(leases=[ledger_pb2.BudgetLease(budget=budget, amount_nano=5)])
    assert await sender.lease(ledger_pb2.LeaseRequest(router_id="router")) == ledger.leases
    sender.spool.close()
    spool = LedgerSpool(tmp_path / "spool", 1 << 20, time.time_ns)
    spool.open()
    assert LedgerSender(spool, ledger.address).last_leases == ledger.leases
    spool.close()
