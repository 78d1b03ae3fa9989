"""Which way envelopes go to a worker: over its socket where it is on this host, else over TCP."""

import asyncio

import pytest
from ringmesh.inference.v1 import inference_pb2

from router.load import WorkerLoad
from router.worker_link import Work, WorkerLink, WorkerLostError, WorkerUnreachableError
from services.inference.envelope_socket import EnvelopeSocket
from services.inference.worker import Work as Received
from services.runtime.protocol import lane_handler
from services.runtime.rpc import Answer, Lane, Service, unary
from services.runtime.server import Engine, Server
from tests.system.processes import free_address

DESCRIPTOR = inference_pb2.DESCRIPTOR.services_by_name["InferenceWorkerService"]
LARGEST = 1 << 20


class Worker:
    """Answers each request with the way it came by, b"tcp" or b"socket"."""

    def __init__(self, folder):
        self.address = free_address()
        self.says = inference_pb2.DescribeResponse(port=int(self.address.rpartition(":")[2]), version=1)
        self.local = EnvelopeSocket(str(folder), self, LARGEST, lambda code: None)
        handlers = {
            "Execute": lane_handler(self.lane(b"tcp")),
            "Describe": unary(inference_pb2.DescribeRequest, self.describe),
        }
        self.server = Server(
            Engine.NATIVE,
            self.address,
            [Service(DESCRIPTOR, handlers)],
            max_message_bytes=LARGEST,
            max_connection_age=300,
        )
        self.gate = asyncio.Event()
        self.gate.set()

    def lane(self, way):
        async def finish(request, deadline):
            await self.gate.wait()
            results = [inference_pb2.WorkResult(response=way) for _ in request.items]
            return Answer(inference_pb2.ExecuteResponse(results=results).SerializeToString(), ())

        return Lane(lambda data, metadata: inference_pb2.ExecuteRequest.FromString(data), finish)

    def admit(self, data):
        items = inference_pb2.ExecuteRequest.FromString(data).items
        return [Received(item.request, b"", None, b"") for item in items]

    def begin(self, works, done):
        async def finish():
            await self.gate.wait()
            results = [inference_pb2.WorkResult(response=b"socket") for _ in works]
            done(Answer(inference_pb2.ExecuteResponse(results=results).SerializeToString(), ()))

        return asyncio.create_task(finish()).cancel

    async def describe(self, request, context):
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
    made = WorkerLink(worker.address, WorkerLoad())
    yield made
    await made.close()


async def outcome(link):
    ended = asyncio.get_running_loop().create_future()
    link.send(b"model", Work(b"request", b"", None, ""), ended.set_result)
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
    other = EnvelopeSocket(str(tmp_path), worker, LARGEST, lambda code: None)
    worker.says.envelope_socket = await other.start()
    await link.describe(5, 0)
    assert await way(link) == b"socket"
    await other.stop(0)


@pytest.mark.parametrize("what", ["another port", "no socket there", "no socket"])
async def test_a_worker_that_may_be_elsewhere_is_asked_over_tcp(worker, link, what):
    if what == "another port":
        worker.says.port += 1
    else:
        worker.says.envelope_socket = f"{worker.says.envelope_socket}.not" if what == "no socket there" else ""
    for _ in range(2):
        await link.describe(5, 0)
        assert await way(link) == b"tcp"


async def test_what_a_socket_takes_with_it_is_lost_what_waits_is_not_and_the_socket_is_found_again(worker, link):
    await link.describe(5, 0)
    worker.gate.clear()
    lost, waits = [], []
    for outcomes in (lost, lost, waits):
        link.send(b"model", Work(b"request", b"", None, ""), outcomes.append)
        await asyncio.sleep(0)
    # As when it dies: both connections end, one a little later than the other.
    link._local.connection().close()
    link._channel._connection._transport.abort()
    async with asyncio.timeout(20):
        while len(lost) < 2:
            await asyncio.sleep(0)
        assert all(isinstance(outcome, WorkerLostError) for outcome in lost)
        worker.gate.set()
        while not waits:
            await asyncio.sleep(0)
        assert waits[0].response
        while await way(link) != b"socket":
            await asyncio.sleep(0.001)


async def test_a_worker_given_up_is_asked_over_tcp_until_it_describes_itself_again(worker, link):
    await link.describe(5, 0)
    worker.gate.clear()
    given_up = asyncio.create_task(outcome(link))
    await asyncio.sleep(0.01)
    link.give_up()
    assert type(await given_up) is WorkerUnreachableError
    worker.gate.set()
    assert await way(link) == b"tcp"
    await link.describe(5, 0)
    assert await way(link) == b"socket"


async def test_a_worker_described_twice_at_once_is_connected_to_once(worker, link):
    await way(link)
    await asyncio.gather(*(link.describe(5, 0) for _ in range(4)))
    async with asyncio.timeout(20):
        while not worker.local.connections:
            await asyncio.sleep(0)
    assert len(worker.local.connections) == 1
