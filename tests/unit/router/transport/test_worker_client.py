"""Which way envelopes go to a worker: over its socket where it is on this host, else over TCP."""

import asyncio
import time

import grpc
import pytest
from ringmesh.inference.v1 import inference_pb2

from router.transport import worker_client
from router.transport.worker_client import (
    MAX_ENVELOPES,
    MAX_ITEMS,
    EnvelopeItem,
    LinkClosedError,
    NotSentError,
    WorkerBusyError,
    WorkerClient,
    WorkerLostError,
    WorkerUnreachableError,
)
from router.transport.worker_load import WorkerLoad
from services.inference.api.envelope_socket import EnvelopeSocket
from services.runtime.driver import ON_LOOP
from services.runtime.oip.protocol import fast_path_handler
from services.runtime.rpc.rpc import Answer, Service, unary
from services.runtime.rpc.server import Engine, Server
from tests.system.processes import free_address

DESCRIPTOR = inference_pb2.DESCRIPTOR.services_by_name["InferenceWorkerService"]
LARGEST = 1 << 20


class Worker:
    """Answers each request with the way it came by, b"tcp" or b"socket"."""

    def __init__(self, folder):
        self.address = free_address()
        self.says = inference_pb2.DescribeResponse(port=int(self.address.rpartition(":")[2]), version=1)
        self.local = EnvelopeSocket(str(folder), self.execute(b"socket"), LARGEST, lambda code: None)
        handlers = {
            "Execute": fast_path_handler(self.execute(b"tcp")),
            "Describe": unary(inference_pb2.DescribeRequest, self.describe),
        }
        self.server = Server(
            Engine.NATIVE,
            self.address,
            [Service(DESCRIPTOR, handlers)],
            max_message_bytes=LARGEST,
            max_connection_age=300,
        )
        self.envelopes = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.describes = asyncio.Event()
        self.describes.set()

    def execute(self, way):
        async def execute(data, metadata, deadline):
            request = inference_pb2.ExecuteRequest.FromString(data)
            if way == b"socket":
                self.envelopes.append(len(request.items))
            await ON_LOOP
            await self.gate.wait()
            results = [inference_pb2.WorkResult(response=way) for _ in request.items]
            return Answer(inference_pb2.ExecuteResponse(results=results).SerializeToString(), ())

        return execute

    async def describe(self, request, context):
        await self.describes.wait()
        return self.says


@pytest.fixture
async def worker(tmp_path):
    made = Worker(tmp_path)
    await made.server.start()
    made.says.envelope_socket = await made.local.start()
    yield made
    await made.local.stop(0)
    await made.server.stop(0)


@pytest.fixture
async def link(worker):
    made = WorkerClient(worker.address, WorkerLoad())
    yield made
    made.close()


async def outcome(link, request=b"request"):
    ended = asyncio.get_running_loop().create_future()
    link.send(b"model", EnvelopeItem(request, b"", None, "", ended.set_result))
    return await asyncio.wait_for(ended, 20)


async def way(link):
    return (await outcome(link)).response


async def test_a_worker_of_this_host_is_asked_over_its_socket_while_it_has_one(worker, link, tmp_path):
    assert await way(link) == b"tcp"
    await link.describe(5, 0)
    assert await way(link) == b"socket"
    await worker.local.stop(5)
    assert await way(link) == b"tcp"
    await link.describe(5, 0)
    assert await way(link) == b"tcp"
    other = EnvelopeSocket(str(tmp_path), worker.execute(b"socket"), LARGEST, lambda code: None)
    worker.says.envelope_socket = await other.start()
    await link.describe(5, 0)
    assert await way(link) == b"socket"
    await other.stop(0)


async def test_a_request_too_large_for_a_worker_fails_as_such_and_the_worker_is_not_taken_for_lost(worker, link):
    for expected in (b"tcp", b"socket"):
        answer = await outcome(link, bytes(LARGEST))
        assert isinstance(answer, inference_pb2.WorkResult)
        assert answer.failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert str(LARGEST) in answer.failure.message
        assert await way(link) == expected
        await link.describe(5, 0)


async def test_requests_that_are_too_large_together_are_sent_alone(worker, link):
    for expected in (b"tcp", b"socket"):
        answers = await asyncio.gather(*(outcome(link, bytes(LARGEST // 2)) for _ in range(3)))
        assert [answer.response for answer in answers] == [expected] * 3
        await link.describe(5, 0)
    assert worker.envelopes == [1, 1, 1]


@pytest.mark.parametrize(("is_alone", "envelopes"), [(False, [3]), (True, [1, 1, 1])])
async def test_a_request_that_may_end_before_the_others_leaves_in_an_envelope_of_its_own(
    worker, link, is_alone, envelopes
):
    await link.describe(5, 0)
    worker.gate.clear()
    ended = [asyncio.get_running_loop().create_future() for _ in range(3)]
    for each in ended:
        link.send(b"model", EnvelopeItem(b"request", b"", None, "", each.set_result, is_alone=is_alone))
    async with asyncio.timeout(60):
        while sum(worker.envelopes) < 3:
            await asyncio.sleep(0)
    assert worker.envelopes == envelopes
    worker.gate.set()
    await asyncio.gather(*ended)


@pytest.mark.parametrize("what", ["another port", "no socket there", "no socket"])
async def test_a_worker_that_may_be_elsewhere_is_asked_over_tcp(worker, link, what):
    if what == "another port":
        worker.says.port += 1
    else:
        worker.says.envelope_socket = f"{worker.says.envelope_socket}.not" if what == "no socket there" else ""
    for _ in range(2):
        await link.describe(5, 0)
        assert await way(link) == b"tcp"


async def test_a_lost_worker_gives_back_at_once_what_it_had_and_what_waited_and_is_sent_nothing_until_it_is_back(
    worker, link
):
    await link.describe(5, 0)
    worker.gate.clear()
    lost, waits = [], []
    for outcomes in (lost, lost, waits):
        link.send(b"model", EnvelopeItem(b"request", b"", None, "", outcomes.append))
        await asyncio.sleep(0)
    # As when it dies: both connections end, one a little later than the other.
    link._local.connection().close()
    link._channel._connection._transport.abort()
    async with asyncio.timeout(60):
        while not waits:
            await asyncio.sleep(0)
    assert [type(outcome) for outcome in (*lost, *waits)] == [WorkerLostError, WorkerLostError, NotSentError]
    assert type(await outcome(link)) is NotSentError
    assert link._load.in_flight == 0
    worker.gate.set()
    await link.describe(5, 0)
    assert await way(link) == b"socket"


async def test_a_worker_given_up_is_sent_nothing_until_it_describes_itself_again(worker, link):
    await link.describe(5, 0)
    worker.gate.clear()
    outcomes = []
    for _ in range(3):
        link.send(b"model", EnvelopeItem(b"request", b"", None, "", outcomes.append))
        await asyncio.sleep(0)
    link.give_up()
    async with asyncio.timeout(60):
        while len(outcomes) < 3:
            await asyncio.sleep(0)
    assert [type(outcome) for outcome in outcomes] == [LinkClosedError, LinkClosedError, NotSentError]
    assert type(await outcome(link)) is NotSentError
    worker.gate.set()
    await link.describe(5, 0)
    assert await way(link) == b"socket"


async def test_a_worker_that_cannot_be_connected_to_was_sent_nothing():
    load = WorkerLoad()
    link = WorkerClient(free_address(), load)
    outcomes = []
    for _ in range(3):
        link.send(b"model", EnvelopeItem(b"request", b"", None, "", outcomes.append))
    async with asyncio.timeout(60):
        while len(outcomes) < 3:
            await asyncio.sleep(0)
    assert [type(outcome) for outcome in outcomes] == [NotSentError] * 3
    assert load.in_flight == 0
    link.close()


async def test_a_long_queue_of_a_closed_link_is_given_back_in_parts(worker, link):
    turns = []

    def count():
        turns.append(None)
        if len(outcomes) < 1000:
            asyncio.get_running_loop().call_soon(count)

    worker.gate.clear()
    outcomes = []
    for _ in range(1000):
        link.send(b"model", EnvelopeItem(b"request", b"", None, "", outcomes.append))
    await asyncio.sleep(0)
    link.give_up()
    count()
    async with asyncio.timeout(60):
        while len(outcomes) < 1000:
            await asyncio.sleep(0)
    assert len(turns) > 1000 / MAX_ITEMS - 1


class FakeChannel:
    """Of a worker that is sent everything, and answers pings as it is told to."""

    def __init__(self, *pings):
        self.pings = [*pings]
        self.cancelled = 0
        # What hears of each envelope, in the order they were sent.
        self.answers = []

    def begin(self, method, request, done):
        self.answers.append(done)
        return self.cancel

    def cancel(self):
        self.cancelled += 1

    def drop(self):
        pass

    async def ping(self, seconds):
        return self.pings.pop(0)


def silent(*pings):
    """A link whose envelope has waited for longer than it should, and its channel."""
    channel = FakeChannel(*pings)
    link = WorkerClient("w:1", WorkerLoad(), lambda _: channel)
    outcomes = []
    link.send(b"model", EnvelopeItem(b"request", b"", None, "", outcomes.append))
    return link, channel, outcomes


async def test_only_a_worker_that_owes_an_answer_is_silent_and_an_answer_to_a_ping_is_heard():
    link, channel, _ = silent(True)
    assert not link.is_silent
    await asyncio.sleep(0)
    assert not link.is_silent
    link._heard -= 10
    assert link.is_silent
    assert await link.is_alive()
    assert not link.is_silent
    link._heard -= 10
    channel.answers[-1](inference_pb2.ExecuteResponse(results=[inference_pb2.WorkResult()]).SerializeToString())
    assert not link.is_silent


@pytest.mark.parametrize(("pings", "alive"), [((False, True), True), ((False, False), False)])
async def test_a_worker_may_miss_one_ping_and_not_two(pings, alive):
    link, channel, _ = silent(*pings)
    assert await link.is_alive() == alive
    assert channel.pings == []


async def test_an_envelope_that_cannot_be_sent_ends_its_requests_with_our_fault():
    link, channel, outcomes = silent()
    channel.begin = None
    await asyncio.sleep(0)
    (outcome,) = outcomes
    assert outcome.code is grpc.StatusCode.INTERNAL
    assert (link._load.in_flight, link._under_way) == (0, 0)


async def test_the_engine_of_a_worker_answers_pings(worker, link):
    assert await link.is_alive()
    await worker.server.stop(0)
    assert not await link.is_alive()


async def test_a_worker_described_twice_at_once_is_connected_to_once(worker, link):
    await way(link)
    await asyncio.gather(*(link.describe(5, 0) for _ in range(4)))
    async with asyncio.timeout(60):
        while not worker.local.connections:
            await asyncio.sleep(0)
    assert len(worker.local.connections) == 1


async def test_a_worker_that_says_nothing_but_is_alive_is_busy_and_one_that_is_gone_is_not(worker, link):
    await link.describe(5, 0)
    worker.describes.clear()
    with pytest.raises(WorkerBusyError):
        await link.describe(0.2, 0)
    worker.describes.set()
    await worker.server.stop(0)
    with pytest.raises(WorkerUnreachableError) as caught:
        await link.describe(5, 0)
    assert not isinstance(caught.value, WorkerBusyError)


async def test_at_most_so_many_envelopes_are_under_way_and_the_next_leaves_as_one_is_answered():
    channel, outcomes = FakeChannel(), []
    link = WorkerClient("w:1", WorkerLoad(), lambda _: channel)
    models = [b"%d" % number for number in range(MAX_ENVELOPES + 20)]
    for model in models:
        link.send(model, EnvelopeItem(b"request", b"", None, "", outcomes.append))
    await asyncio.sleep(0)
    assert len(channel.answers) == MAX_ENVELOPES
    answer = inference_pb2.ExecuteResponse(results=[inference_pb2.WorkResult()]).SerializeToString()
    for number in range(len(models)):
        assert len(channel.answers) == min(MAX_ENVELOPES + number, len(models))
        channel.answers[number](answer)
    assert len(outcomes) == len(models)


async def test_what_waits_behind_the_limit_of_envelopes_is_given_back_when_the_link_closes():
    channel, outcomes = FakeChannel(), []
    link = WorkerClient("w:1", WorkerLoad(), lambda _: channel)
    for number in range(MAX_ENVELOPES + 20):
        link.send(b"%d" % number, EnvelopeItem(b"request", b"", None, "", outcomes.append))
    await asyncio.sleep(0)
    link.give_up()
    async with asyncio.timeout(60):
        while len(outcomes) < MAX_ENVELOPES + 20:
            await asyncio.sleep(0)
    assert sum(type(outcome) is NotSentError for outcome in outcomes) == 20


def test_an_envelope_is_an_execute_request_and_holds_large_requests_uncopied():
    sent = [
        (b"small", b"", None, "00-a-b-01"),
        (large := bytes(1 << 20), b"h" * 16, time.monotonic() + 100, "00-c-d-00"),
        (b"", b"", time.monotonic() - 1, ""),
    ]
    items = [EnvelopeItem(*fields, lambda _: None) for fields in sent]
    pieces = worker_client._SentEnvelope(worker_client._ModelQueue(), items).request()
    assert any(piece is large for piece in pieces)
    read = inference_pb2.ExecuteRequest.FromString(b"".join(pieces)).items
    assert [(item.request, item.request_hash, item.traceparent) for item in read] == [
        (request, request_hash, traceparent) for request, request_hash, _, traceparent in sent
    ]
    assert read[0].timeout_us == 0
    assert 0 < read[1].timeout_us <= 100_000_000
    assert read[2].timeout_us == 1
