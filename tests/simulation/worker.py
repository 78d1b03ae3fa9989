"""A worker as a simulated process: all of services/inference except the engine and ONNX Runtime."""

from ringmesh.inference.v1 import inference_pb2

from services.inference.api.control import ModelControl
from services.inference.api.envelope_socket import EnvelopeSocket, _EnvelopeConnection
from services.inference.api.service import EnvelopeService
from services.inference.worker import Worker
from services.runtime.redis import discovery
from services.runtime.rpc.calls import Calls
from services.runtime.telemetry.worker_spans import EXECUTE
from tests.simulation.loop import Process, Threads
from tests.simulation.model import open_model
from tests.simulation.network import Server
from tests.simulation.redis import REDIS_URL
from tests.simulation.sockets import Socket
from tests.simulation.state import Decisions, Snapshots, Store

_INFERENCE = "/inference.GRPCInferenceService/"
_WORKER = "/ringmesh.inference.v1.InferenceWorkerService/"
_PORT = 8100
_LARGEST = 1 << 26


class SimWorker:
    """The worker at `address`; each start is a new process. `lie` may change its answers."""

    def __init__(self, world, number, *, weight=1.0, threads=2, local=False):
        self.world = world
        self.worker_id = f"worker-{number}"
        self.address = f"10.0.0.{number + 1}:{_PORT}"
        self.weight = weight
        self.threads = threads
        self.local = local
        self.lie = None
        self.decisions = Decisions()
        self.process = None
        self.worker = None
        self.store = None
        self.starts = 0

    @property
    def is_up(self):
        """Whether its process is alive and ready; it may still be stopped."""
        return self.worker is not None and self.process.alive

    def start(self):
        """Starts a new process."""
        self.starts += 1
        self.worker = self.store = None
        self.process = Process(self.world.loop, self.worker_id)
        self.process.spawn(self._serve(self.process))

    def kill(self, why):
        """Kills the process; all requests in flight are lost."""
        if self.process.alive:
            self.world.trace("kill", self.worker_id, why)
            self.process.kill()
            self.world.loop.sockets.pop(self._path, None)

    def move(self):
        """Kills the process and starts a new one at another address, as a cluster does with a pod."""
        self.kill("move")
        self.address = f"10.0.2.{self.starts}:{_PORT}"
        self.start()

    @property
    def _path(self):
        return f"/sockets/{self.worker_id}/{self.starts}"

    async def _serve(self, process):
        world = self.world
        self.store = store = Store(
            world.repository,
            lambda files: open_model(files, world.runs),
            Threads(self.threads),
            snapshots=Snapshots(),
            decisions=self.decisions,
        )
        await store.load_all()
        worker = Worker(self.worker_id, store)
        envelopes = EnvelopeService(worker, weight=self.weight)
        calls = Calls()
        service = envelopes.service(calls)
        handlers = {f"/{service.name}/{method}": handler for method, handler in service.handlers.items()}
        handlers |= {_INFERENCE + method: handler for method, handler in ModelControl(store).handlers().items()}
        if self.local:
            local = EnvelopeSocket("", envelopes.execute, _LARGEST, calls.counter(EXECUTE))
            world.loop.sockets[self._path] = Socket(
                world.loop, world.random, process, lambda: _EnvelopeConnection(local)
            )
            envelopes.socket, envelopes.port = self._path, _PORT
        world.network.servers[self.address] = Server(
            process, _PORT, _WORKER + "Execute", service.fast_paths["Execute"], handlers, self._lied
        )
        if world.redis is not None and world.announced:
            discovery.Announcer(discovery.connect(REDIS_URL), lambda: envelopes.announcement(self.address)).start()
        self.worker = worker
        world.trace("up", self.worker_id)

    def _lied(self, method, body):
        return body if self.lie is None else self.lie(method, body)


class Liar:
    """Changes a share of a worker's answers, in one randomly chosen way."""

    def __init__(self, random, share):
        self._random = random
        self._share = share
        self._way = random.choice(
            ("versions", "weights", "loads", "too few", "garbage", "empty", "costs", "digests", "responses", "failures")
        )

    def __str__(self):
        return self._way

    def __call__(self, method, body):
        random = self._random
        if random.random() >= self._share:
            return body
        way = self._way
        if way == "garbage":
            return random.randbytes(len(body))
        if way == "empty":
            return b""
        if method.endswith("Describe"):
            told = inference_pb2.DescribeResponse.FromString(body)
            if way == "versions":
                for model in told.models:
                    model.version = random.choice(("abc", "", "-1", "1.0", "9" * 30, "²"))
            elif way == "weights":
                told.weight = random.choice((-1.0, 5e-324, float("nan"), float("inf"), 1e308))
            elif way == "digests":
                for model in told.models:
                    model.digest = random.choice((b"", b"x", random.randbytes(16), random.randbytes(64)))
            elif way == "loads":
                told.load.requests = random.choice((0, 2**32 - 1))
                told.load.estimated_wait_us = random.choice((0, 2**64 - 1))
                told.load.version = told.version = random.choice((0, 1, 2**64 - 1))
            return told.SerializeToString()
        if method.endswith("Execute"):
            told = inference_pb2.ExecuteResponse.FromString(body)
            if way == "too few" and told.results:
                del told.results[random.randrange(len(told.results)) :]
            elif way == "loads":
                told.load.requests = random.choice((0, 2**32 - 1))
                told.load.estimated_wait_us = random.choice((0, 2**64 - 1))
            for result in told.results:
                if way == "costs":
                    result.timing.compute_us = random.choice((0, 2**64 - 1, 2**63))
                    result.timing.batch_rows = result.timing.batch_requests = random.choice((0, 2**32 - 1))
                elif way == "digests":
                    result.model_digest = random.choice((b"", b"x", random.randbytes(16), random.randbytes(64)))
                elif way == "responses":
                    result.response = random.choice((b"", b"\xff", random.randbytes(40)))
                elif way == "failures":
                    result.failure.code = random.choice((0, 99, -1, 2, 14, 8, 9))
            return told.SerializeToString()
        return body
