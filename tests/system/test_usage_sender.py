"""What a router spools reaches the ledger once, whatever the ledger says."""

import asyncio
import errno
import time
from functools import partial
from pathlib import Path
from random import Random

import grpc
import pytest
from ringmesh.ledger.v1 import ledger_pb2, ledger_pb2_grpc

from router.accounting import ledger_sender
from router.accounting.ledger_sender import LedgerSender
from router.accounting.ledger_spool import LedgerSpool
from services.ledger.ingest.batch import read
from services.ledger.ingest.producers import BatchFate, Mark
from services.runtime.errors import InvalidArgumentError, RingmeshError
from services.runtime.rpc.rpc import abort, parse
from tests.system.ledgers import DUPLICATE, GAP, WRITTEN, miss, worker_time
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
        if isinstance(answer, RingmeshError):
            await abort(context, answer)
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
    ledger.script = [InvalidArgumentError("record 0: at_ms is no time", field="batch.at_ms")]
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
    before = sender.router_id
    ledger.script = [(grpc.StatusCode.FAILED_PRECONDITION, "written with other bytes; start a new epoch")]
    await submit(sender, *BATCHES[:2])
    await all_sent(sender)
    assert [(sequence, batch) for _, sequence, batch in ledger.written] == [(1, BATCHES[0]), (2, BATCHES[1])]
    assert ledger.written[0][0] > 1000
    assert sender.router_id != before


async def test_what_another_router_of_the_same_id_reports_of_workers_is_not_taken_for_written(ledger, sender):
    ledger.script = [(grpc.StatusCode.FAILED_PRECONDITION, "written with other bytes; start a new epoch")]
    uptime = encode([], [worker_time("w", 30_000_000)])
    await sender.submit(uptime, 0, 0)
    await all_sent(sender)
    assert [batch for _, _, batch in ledger.written] == [uptime]


async def test_what_stands_for_a_damaged_batch_that_was_written_is_not_sent_again(ledger, sender):
    ledger.script = [(grpc.StatusCode.FAILED_PRECONDITION, "written with other bytes; start a new epoch")]
    await sender.submit(encode([], dropped_requests=5), 0, 0)
    await submit(sender, BATCHES[0])
    await all_sent(sender)
    assert [(sequence, batch) for _, sequence, batch in ledger.written] == [(2, BATCHES[0])]


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(ledger_sender, "_FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(ledger_sender, "_LONGEST_PAUSE_SECONDS", 0.0)


@pytest.mark.usefixtures("no_pauses")
async def test_a_batch_that_is_damaged_on_its_way_is_sent_again(ledger, sender):
    ledger.script = [InvalidArgumentError("batch 1 is damaged", field="digest")] * 5 + [0]
    await submit(sender, *BATCHES[:2])
    await all_sent(sender)
    assert [batch for _, _, batch in ledger.written] == BATCHES[:2]
    assert sender.dropped_requests == 0


@pytest.mark.usefixtures("no_pauses")
async def test_a_batch_that_cannot_be_read_for_a_while_is_not_given_up(ledger, sender, monkeypatch):
    read_bytes = Path.read_bytes
    faults = [OSError(errno.EMFILE, "Too many open files")] * 3

    def fail_first(path):
        if path.suffix == ".batch" and faults:
            raise faults.pop()
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", fail_first)
    await submit(sender, *BATCHES[:2])
    await all_sent(sender)
    assert [batch for _, _, batch in ledger.written] == BATCHES[:2]
    assert sender.failures == 3


class Wire(grpc.GenericRpcHandler):
    """A ledger in memory behind a wire that does to each message what `damages` has, in turn; then no harm."""

    def __init__(self, damages):
        self.damages = damages
        self.marks = {}
        self.written = []

    def service(self, call):
        return grpc.unary_unary_rpc_method_handler(self.append)

    async def append(self, data, context):
        try:
            request = parse(ledger_pb2.AppendRequest, self.damages.pop(0)(data) if self.damages else data)
            batch = read(request)
        except InvalidArgumentError as error:
            await abort(context, error)
        mark = self.marks.setdefault(batch.producer, Mark(1, 0, {}))
        fate = mark.judge(batch)
        if fate is BatchFate.CONFLICT:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "start a new epoch")
        if fate is BatchFate.WRITE:
            self.written.append(request.batch)
        result = {BatchFate.WRITE: WRITTEN, BatchFate.DUPLICATE: DUPLICATE, BatchFate.GAP: GAP}[fate]
        return ledger_pb2.AppendResponse(result=result, last_sequence=mark.last).SerializeToString()


def flipped(data, place, bit):
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


@pytest.mark.usefixtures("no_pauses")
async def test_whatever_happens_to_a_batch_on_its_way_it_is_counted_once(tmp_path):
    random = Random(1)
    damages = []
    for _ in range(150):
        place, bit = random.randrange(1 << 20), random.randrange(8)
        truncated = partial(lambda data, place: data[: place % len(data)], place=place)
        damages.append(random.choice([truncated, partial(flipped, place=place, bit=bit), lambda data: data]))
    wire = Wire(damages)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([wire])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    spool = LedgerSpool(tmp_path / "spool", 1 << 20, lambda: 1000)
    spool.open()
    sender = LedgerSender(spool, f"127.0.0.1:{port}")
    sender.spool = spool
    sender.start()
    batches = [encode([miss("t", at_ms=1_796_000_000_000, compute_us=number)]) for number in range(60)]
    await submit(sender, *batches)
    await all_sent(sender)
    assert sorted(wire.written) == sorted(batches)
    assert sender.dropped_requests == 0
    await sender.close(0)
    await server.stop(0)


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
