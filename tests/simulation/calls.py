"""Requests of simulated callers, and the state of each until it ends."""

import numpy as np
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.rpc.rpc import Answer
from tests.simulation.clock import clock
from tests.simulation.model import COLUMNS, VARIANTS, answer

# A router answers at most this long after the deadline.
EPSILON_NS = 5_000_000


class Call:
    """One request at one router. Times in ns of the clock; `timeout` in seconds, None without a deadline.

    `invalid` is the status code that it must end with; "" for a valid request.
    """

    def __init__(self, world, number, router, kind, rows, *, tenant="", control="", timeout=None, invalid=""):
        self.world = world
        self.number = number
        self.router = router
        # The process of the router that gets the request.
        self.process = router.process
        self.kind = kind
        self.rows = np.asarray(rows, np.float32).reshape(-1, COLUMNS)
        self.tenant = tenant
        self.control = control
        self.timeout = timeout
        self.invalid = invalid
        self.data = self._request()
        self.metadata = [("user-agent", "simulation")]
        if tenant:
            self.metadata.append(("ringmesh-tenant", tenant))
        if control:
            self.metadata.append(("cache-control", control))
        self.cancel_at_router = None
        self.sent_ns = self.received_ns = self.ended_ns = 0
        self.cancelled = False
        self.lost = False
        self.code = ""
        self.message = ""
        self.outcome = ""
        self.variant = -1
        self.at_ns = None

    def __repr__(self):
        ids = ",".join(f"{row[0]:g}" for row in self.rows[:4])
        return f"#{self.number} {self.kind}[{ids}]{' ' + self.tenant if self.tenant else ''} at {self.router.name}"

    def _request(self):
        request = v2.ModelInferRequest(model_name=self.kind, id=str(self.number))
        request.inputs.add(name="x", datatype="FP32", shape=self.rows.shape)
        request.raw_input_contents.append(self.rows.tobytes())
        if self.invalid == "NOT_FOUND":
            request.model_name = "nobody"
        elif self.invalid == "INVALID_ARGUMENT":
            way = self.number % 5
            if way == 0:
                return b"\xff\xff" + request.SerializeToString()
            if way == 1:
                request.inputs[0].shape[1] = COLUMNS + 1
            elif way == 2:
                request.inputs[0].datatype = "INT64"
            elif way == 3:
                request.raw_input_contents.append(b"more")
            else:
                request.inputs[0].name = "z"
        return request.SerializeToString()

    @property
    def is_open(self):
        """Whether the caller still waits for an answer."""
        return not (self.code or self.cancelled or self.lost)

    def send(self):
        """Sends the request from the caller to the router."""
        world = self.world
        self.sent_ns = clock.now_ns
        world.trace("send", self, self.control, self.timeout)
        process = self.process
        if not process.alive or self.router.fleet is None:
            self.lose()
            return
        process.died.append(self.lose)
        process.call_at(clock.now_ns + world.random.randint(20_000, 200_000), self._arrive)
        if self.timeout is not None:
            world.loop.call_later(self.timeout + 0.05, self.leave)

    def _arrive(self):
        if self.is_open:
            self.received_ns = clock.now_ns
            self.router.receive(self)

    def lose(self):
        """Marks the request as lost: its router died."""
        if self.is_open:
            self.lost = True

    def leave(self):
        """Cancels the request: the caller leaves."""
        if self.is_open:
            self.world.left(self)
            self.cancelled = True
            self.ended_ns = clock.now_ns
            self.world.trace("leave", self)
            self.process.call(self.router.cancel, self)

    def answered_by_router(self, answered):
        """Records and judges the router's answer; runs in the router's process."""
        world = self.world
        if self.cancelled or not self.process.alive:
            return
        if self.code:
            world.violated(f"{self} is answered twice")
            return
        self.ended_ns = clock.ns()
        if isinstance(answered, Answer):
            self.code = "OK"
            self.outcome = dict(answered.trailing)["ringmesh-cache"]
            self._read(answered.body)
        else:
            self.code = answered.code.name
            self.message = answered.message
        world.trace("end", self, self.code, self.outcome, self.message, self.variant)
        world.judge(self)

    def _read(self, body):
        try:
            response = v2.ModelInferResponse.FromString(body)
            y, at = response.raw_output_contents
            y = np.frombuffer(y, np.float32).reshape(self.rows.shape)
            self.at_ns = np.frombuffer(at, np.int64).reshape(self.rows.shape)[:, 0] * 1000
        except Exception:
            return
        if response.model_name == self.kind and response.id == str(self.number):
            for variant in range(VARIANTS):
                if (answer(self.kind, variant, self.rows) == y).all():
                    self.variant = variant
