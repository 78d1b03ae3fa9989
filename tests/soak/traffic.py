"""Callers of every kind, each call with a deadline: valid, invalid, huge, cancelled and hostile ones."""

from __future__ import annotations

import asyncio
import collections
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeAlias

import grpc
import numpy as np
import onnxruntime
import ringmesh
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.oip.tensors import DATATYPES, encode
from tests.models import IDENTITIES

Metadata: TypeAlias = tuple[tuple[str, str], ...]
Call: TypeAlias = Callable[[grpc.aio.Channel], Awaitable[None]]

INFER = "/inference.GRPCInferenceService/ModelInfer"
DEADLINE_SECONDS = 20.0
# A call that ends this long after its deadline was not ended by it.
GRACE_SECONDS = 2.0
_POOL = 500
_KINDS = ("mlp", "mlp", "rows", "identity", "words", "add_sub", "pipeline", "scoped")
# What a wrong request may be told; anything else is a fault of ours.
CALLERS_FAULT = frozenset(
    {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"}
)
# While a fault is under way, and of a caller that left.
TRANSIENT = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "RESOURCE_EXHAUSTED"})
# A connection of its own: with others' it would go to the one router that they all have.
OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)


@dataclass
class Tally:
    """What became of the calls of one kind."""

    sent: int = 0
    answered: int = 0
    wrong: int = 0
    hung: int = 0
    slowest: float = 0.0
    codes: collections.Counter[str] = field(default_factory=collections.Counter)
    # The first of each kind, for whoever has to find out.
    examples: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, example: str) -> None:
        """Counts `what` among the codes."""
        self.codes[what] += 1
        self.examples.setdefault(what, example[:300])


@dataclass(frozen=True)
class Question:
    """A request, and the arrays that ONNX Runtime answers it with in this process; None: any answer will do."""

    body: bytes
    expected: dict[str, np.ndarray] | None
    # Number of the caller's; None: any.
    tenant: int | None = None

    def of(self, tenant: int) -> Question:
        return replace(self, tenant=tenant)


class Questions:
    """Draws valid questions about the models of tests/models.build, by `random`."""

    def __init__(self, repository: Path, draw: random.Random) -> None:
        self._draw = draw
        names = ["mlp", "add_sub", "words", "doubled", *(f"identity_{kind}" for kind in IDENTITIES if kind != "bf16")]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._sessions = {
            name: onnxruntime.InferenceSession(
                repository / name / "1/model.onnx", options, providers=["CPUExecutionProvider"]
            )
            for name in names
        }
        self._pool = [self.fresh() for _ in range(_POOL)]

    def next(self) -> Question:
        """One of the pool, which the cache knows after a while, as often as one that is new."""
        return self._draw.choice(self._pool) if self._draw.random() < 0.5 else self.fresh()

    def fresh(self, kinds: Sequence[str] = _KINDS) -> Question:
        """One that was hardly asked before."""
        kind = self._draw.choice(kinds)
        rng = np.random.default_rng(self._draw.getrandbits(64))
        rows = self._draw.randint(1, 6)
        if kind == "identity":
            name = self._draw.choice([name for name in self._sessions if name.startswith("identity")])
            return self._ask(name, {"x": _values(rng, name.removeprefix("identity_"), rows)})
        if kind == "words":
            words = ["to", "be", "or", "not", "that", "is", "the", "question", "x" * self._draw.randint(0, 40)]
            texts = [[self._draw.choice(words) for _ in range(5)] for _ in range(rows)]
            return self._ask("words", {"x": np.array(texts, object)})
        if kind == "add_sub":
            return self._ask("add_sub", {name: rng.normal(size=(rows, 2)).astype(np.float32) for name in "ab"})
        if kind == "scoped":
            x = rng.normal(size=(rows, 1)).astype(np.float32)
            return Question(_body("scoped", {"x": x}), {"y": x}, self._draw.randint(0, 3000))
        x = rng.normal(size=(rows, 64)).astype(np.float32)
        if kind == "pipeline":
            (y,) = self._sessions["mlp"].run(["y"], {"x": x})
            return Question(_body("pipeline", {"in": x}), {"out": y + y})
        return self._ask("mlp", {"x": x}, served_by="row_cached" if kind == "rows" else "mlp")

    def _ask(self, name: str, inputs: dict[str, np.ndarray], served_by: str = "") -> Question:
        session = self._sessions[name]
        feeds = {key: array.astype(str) if array.dtype.hasobject else array for key, array in inputs.items()}
        names = [output.name for output in session.get_outputs()]
        return Question(_body(served_by or name, inputs), dict(zip(names, session.run(names, feeds), strict=True)))


def _values(rng: np.random.Generator, kind: str, rows: int) -> np.ndarray:
    dtype = DATATYPES[_datatype_of_kind(kind)].dtype
    if dtype.hasobject:
        return np.array([[b"%d" % number for number in rng.integers(0, 1 << 40, 3)] for _ in range(rows)], object)
    if dtype.kind in "biu":
        return rng.integers(0, 2 if dtype.kind == "b" else 100, (rows, 3)).astype(dtype)
    return (rng.normal(size=(rows, 3)) * 10.0 ** rng.integers(-3, 4)).astype(dtype)


def _datatype_of_kind(kind: str) -> str:
    return {"bytes": "BYTES", "bool": "BOOL"}.get(kind, kind.upper())


def _datatype(array: np.ndarray) -> str:
    if array.dtype.hasobject:
        return "BYTES"
    return next(name for name, known in DATATYPES.items() if known.dtype == array.dtype)


def _body(model: str, inputs: dict[str, np.ndarray]) -> bytes:
    request = v2.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        if array.dtype.hasobject:
            array = np.array(
                [str(item).encode() if not isinstance(item, bytes) else item for item in array.flat], object
            ).reshape(array.shape)
        request.inputs.add(name=name, datatype=_datatype(array), shape=array.shape)
        request.raw_input_contents.append(_raw(array))
    return request.SerializeToString()


def _raw(array: np.ndarray) -> bytes:
    return bytes(encode(array))


def is_right(body: bytes, expected: dict[str, np.ndarray]) -> bool:
    """Whether it is what ONNX Runtime says: to the bit but for floats, whose last bits a batch may change."""
    response = v2.ModelInferResponse.FromString(body)
    if {output.name for output in response.outputs} != expected.keys():
        return False
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        wanted = expected[output.name]
        if tuple(output.shape) != wanted.shape:
            return False
        if wanted.dtype.kind == "f":
            got = np.frombuffer(raw, wanted.dtype).reshape(wanted.shape).astype(np.float64)
            if not np.allclose(got, wanted.astype(np.float64), rtol=1e-4, atol=1e-5, equal_nan=True):
                return False
        else:
            texts = (
                wanted
                if not wanted.dtype.hasobject
                else np.array(
                    [item.encode() if isinstance(item, str) else item for item in wanted.flat], object
                ).reshape(wanted.shape)
            )
            if raw != _raw(texts):
                return False
    return True


class Access(Protocol):
    """How callers reach the stack at `target`, host:port. After a change of `generation`, they open new channels."""

    target: str
    generation: int
    # Whether valid callers wait while nobody listens.
    waits: bool

    def channel(self, *, retries: bool) -> grpc.aio.Channel: ...

    def metadata(self, tenant: int | None) -> Metadata: ...


@dataclass
class PlainText:
    """Without identity: callers name their tenant."""

    target: str
    generation: int = 0
    waits: bool = False

    def channel(self, *, retries: bool) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.target, [*ringmesh.channel_options(retries=retries), OWN_CONNECTION])

    def metadata(self, tenant: int | None) -> Metadata:
        return (("ringmesh-tenant", f"tenant-{tenant}"),) if tenant is not None else ()


class Callers:
    """Goes on calling until it is stopped; what became of it is in `tallies`, by kind."""

    def __init__(self, access: Access, questions: Questions, draw: random.Random) -> None:
        self._access = access
        self._questions = questions
        self._draw = draw
        self._stopping = False
        self.tallies: dict[str, Tally] = collections.defaultdict(Tally)

    def kinds(self) -> list[tuple[Call, float]]:
        """The callers beside the valid ones, each with its mean pause in seconds."""
        return [
            (self._invalid, 0.02), (self._huge, 1.0), (self._cancelled, 0.02), (self._hostile, 0.1),
            (self._garbage, 0.5),
        ]  # fmt: skip

    def stop(self) -> None:
        """No further calls; those under way are waited for."""
        self._stopping = True

    async def run(self) -> None:
        """All callers, until `stop`."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(self._loop(self._valid, 0.002, retries=True))
            for caller, pause in self.kinds():
                tasks.create_task(self._loop(caller, pause, retries=False))

    async def _loop(self, call: Call, pause: float, *, retries: bool) -> None:
        while not self._stopping:
            generation = self._access.generation
            async with self._access.channel(retries=retries) as channel:
                while not self._stopping and self._access.generation == generation:
                    await call(channel)
                    await asyncio.sleep(self._draw.uniform(0, 2 * pause))

    async def _valid(self, channel: grpc.aio.Channel) -> None:
        question = self._questions.next()
        await self._call("valid", channel, question, may_fail=frozenset())

    async def _call(
        self, kind: str, channel: grpc.aio.Channel, question: Question, *, may_fail: frozenset[str]
    ) -> str | None:
        """Where the answer came from: the metadata `ringmesh-cache`. None if there is none."""
        tally = self.tallies[kind]
        tally.sent += 1
        began = time.monotonic()
        try:
            call = channel.unary_unary(INFER)(
                question.body,
                timeout=DEADLINE_SECONDS,
                metadata=self._access.metadata(question.tenant),
                wait_for_ready=self._access.waits and not may_fail,
            )
            answer: bytes = await asyncio.wait_for(call, DEADLINE_SECONDS + GRACE_SECONDS)
        except TimeoutError:
            tally.hung += 1
            return None
        except grpc.aio.AioRpcError as error:
            tally.note(error.code().name, f"at {time.strftime('%H:%M:%S')}: {error.details()}")
            tally.answered += error.code().name in may_fail
            return None
        finally:
            tally.slowest = max(tally.slowest, time.monotonic() - began)
        tally.answered += 1
        if question.expected is not None and not is_right(answer, question.expected):
            tally.wrong += 1
            tally.note("wrong", question.body[:60].hex())
        return str(dict(await call.trailing_metadata()).get("ringmesh-cache", ""))

    async def _invalid(self, channel: grpc.aio.Channel) -> None:
        request = v2.ModelInferRequest(model_name="mlp", raw_input_contents=[bytes(256)])
        tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 64])
        what = self._draw.choice(["model", "name", "shape", "type", "size", "missing", "version", "outputs", "garbage"])
        if what == "model":
            request.model_name = f"unknown-{self._draw.getrandbits(32)}"
        elif what == "name":
            tensor.name = f"input-{self._draw.getrandbits(32)}"
        elif what == "shape":
            tensor.shape[1] = self._draw.choice([-1, 0, 63, 65, 2**62])
        elif what == "type":
            tensor.datatype = self._draw.choice(["FP64", "BYTES", "nothing", ""])
        elif what == "size":
            request.raw_input_contents[0] = bytes(self._draw.randint(0, 255))
        elif what == "missing":
            del request.inputs[:], request.raw_input_contents[:]
        elif what == "version":
            request.model_version = self._draw.choice(["7", "x", "-1", "9" * 50])
        elif what == "outputs":
            request.outputs.add(name="z")
        body = request.SerializeToString()
        if what == "garbage":
            body = self._draw.randbytes(self._draw.randint(1, 200)) + b"\xff"
        await self.refused("invalid", channel, body, self._access.metadata(None))

    async def refused(
        self,
        kind: str,
        channel: grpc.aio.Channel,
        body: bytes,
        metadata: Metadata,
        codes: frozenset[str] = CALLERS_FAULT,
        method: str = INFER,
    ) -> None:
        """One that must be refused with one of `codes`; while routers are down, as their fault."""
        tally = self.tallies[kind]
        tally.sent += 1
        began = time.monotonic()
        try:
            await asyncio.wait_for(
                channel.unary_unary(method)(body, timeout=DEADLINE_SECONDS, metadata=metadata),
                DEADLINE_SECONDS + GRACE_SECONDS,
            )
            tally.wrong += 1
            tally.note("OK", f"{method} {body[:60].hex()}")
        except TimeoutError:
            tally.hung += 1
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            tally.note(code, f"{method}: {error.details()}")
            tally.answered += code in codes
            tally.wrong += code not in codes | TRANSIENT
        finally:
            tally.slowest = max(tally.slowest, time.monotonic() - began)

    async def _huge(self, channel: grpc.aio.Channel) -> None:
        """Up to 16 MB there and back; and one that is larger than messages may be."""
        rng = np.random.default_rng(self._draw.getrandbits(64))
        x = rng.random((1, self._draw.randint(1 << 18, 1 << 22)), np.float32)
        await self._call("huge", channel, Question(_body("identity_fp32", {"x": x}), {"y": x}), may_fail=TRANSIENT)

    async def _cancelled(self, channel: grpc.aio.Channel) -> None:
        """Callers that leave at any moment."""
        tally = self.tallies["cancelled"]
        tally.sent += 1
        body, metadata = self._questions.fresh().body, self._access.metadata(None)
        call = channel.unary_unary(INFER)(body, timeout=DEADLINE_SECONDS, metadata=metadata)
        await asyncio.sleep(self._draw.choice([0, 0.0005, 0.002, 0.005]))
        call.cancel()
        tally.answered += 1

    async def _hostile(self, channel: grpc.aio.Channel) -> None:
        """Requests made to cost much more than they should."""
        request = v2.ModelInferRequest(model_name="mlp")
        metadata = self._access.metadata(None)
        codes = CALLERS_FAULT
        what = self._draw.choice(["inputs", "outputs", "parameters", "dimensions", "contents", "tenant", "twice"])
        count = 20_000
        if what == "inputs":
            for _ in range(count):
                request.inputs.add()
            request.raw_input_contents.extend([b""] * count)
        elif what == "outputs":
            for _ in range(count):
                request.outputs.add()
        elif what == "parameters":
            for number in range(count):
                request.parameters[f"p{number}"].int64_param = number
        elif what == "dimensions":
            request.inputs.add(name="x", datatype="FP32", shape=[1] * count)
            request.raw_input_contents.append(bytes(4))
        elif what == "contents":
            request.inputs.add(name="x", datatype="BYTES", shape=[count]).contents.bytes_contents.extend([b""] * count)
        elif what == "tenant":
            request = v2.ModelInferRequest(model_name="scoped", raw_input_contents=[bytes(3)])
            request.inputs.add(name="x", datatype="FP32", shape=[1, 1])
            metadata = (*metadata, ("ringmesh-tenant", f"{self._draw.getrandbits(64):x}" * 8))
            codes = codes | {"PERMISSION_DENIED"}
        else:
            request.inputs.add(name="x", datatype="FP32", shape=[1, 64])
            request.inputs.add(name="x", datatype="FP32", shape=[1, 64])
            request.raw_input_contents.extend([bytes(256)] * 2)
        await self.refused("hostile", channel, request.SerializeToString(), metadata, codes)

    async def _garbage(self, _: grpc.aio.Channel) -> None:
        """Connections that speak something else, begin and do not go on, or do not read."""
        tally = self.tallies["connections"]
        tally.sent += 1
        host, _, port = self._access.target.rpartition(":")
        try:
            _, writer = await asyncio.open_connection(host, int(port))
            preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            writer.write(self._draw.choice([b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, preface, preface + b"\xff" * 9]))
            await asyncio.sleep(self._draw.uniform(0, 0.5))
            writer.close()
        except OSError:
            pass  # a router is down
        tally.answered += 1
