"""The console's view of the fleet: polls routers and cache, and keeps the last answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import grpc
from ringmesh.cache.v1 import cache_pb2, cache_pb2_grpc
from ringmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

from services.console.data.fleet_events import EventFeed
from services.runtime.rpc.access import AUTHORIZATION, CREDENTIAL
from services.runtime.rpc.client_metadata import sending
from services.runtime.rpc.service_tls import ServiceTls, open_channel
from services.runtime.telemetry.supervisor import BACKGROUND
from services.runtime.verdict import YES, Verdict

_ASK_SECONDS = 1.0
_MODELS_EVERY = 5
_TIMEOUT = 2.0
# Calls to a worker that has left have this long to end.
_GRACE_SECONDS = 5.0
OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
PENDING = "no answer yet"
Response = TypeVar("Response")


@dataclass(frozen=True, slots=True)
class ServiceView:
    """The last answer of a router or the cache service. `problem`: why it does not answer at present; "" if it does."""

    address: str
    problem: str = PENDING
    workers: tuple[router_pb2.Worker, ...] = ()
    answered_at: float = 0.0

    @property
    def is_down(self) -> bool:
        """Whether it was asked and does not answer."""
        return self.problem not in ("", PENDING)


@dataclass(frozen=True, slots=True)
class ModelReplica:
    """A model version on one worker, as the worker describes it."""

    worker: str
    served: inference_pb2.ModelVersion

    @property
    def cacheable(self) -> Verdict:
        return YES if self.served.cacheable else Verdict(self.served.cacheable_reason or "not cacheable")


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """A model version that a worker could not load. `version` is "" if the reason concerns all versions."""

    worker: str
    model: str
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model version of the fleet. `state` and `reason` come from the repository index."""

    name: str
    version: str
    state: str
    reason: str
    replicas: tuple[ModelReplica, ...] = ()

    @property
    def cacheable(self) -> Verdict:
        """Whether the answers of any worker are cached."""
        verdicts = [replica.cacheable for replica in self.replicas]
        return YES if not verdicts or any(verdicts) else verdicts[0]

    @property
    def batching(self) -> str:
        return next((replica.served.batch_remark for replica in self.replicas if replica.served.batch_remark), "")

    @property
    def providers(self) -> str:
        """The execution providers of ONNX Runtime, without the suffix ExecutionProvider."""
        return ", ".join(
            sorted({replica.served.provider.removesuffix("ExecutionProvider") for replica in self.replicas})
        )


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """The state of the fleet at one time."""

    routers: tuple[ServiceView, ...]
    cache: ServiceView
    models: tuple[ModelView, ...] = ()
    failures: tuple[LoadFailure, ...] = ()

    @property
    def router(self) -> ServiceView | None:
        """The first router that answers; None if none does."""
        return next((router for router in self.routers if not router.problem), None)

    @property
    def workers(self) -> Mapping[str, router_pb2.Worker]:
        """Workers by address, from the first router that answers, else from the last router that answered."""
        seen = self.router or max(self.routers, key=lambda router: router.answered_at)
        return {worker.address: worker for worker in seen.workers}


class FleetWatch:
    """Polls the fleet every second. `view` is the current snapshot. `credential` is sent with every call."""

    def __init__(
        self, routers: tuple[str, ...], cache: str, credential: str = "", tls: ServiceTls | None = None
    ) -> None:
        self._credential = credential
        self._tls = tls
        # The console's own, by address.
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.view = FleetSnapshot(tuple(ServiceView(address) for address in routers), ServiceView(cache))
        self.events = EventFeed()
        self._tasks: list[asyncio.Task[None]] = []

    def _connect(self, address: str, authorization: str = "") -> grpc.aio.Channel:
        sends = sending(AUTHORIZATION, authorization) or sending(CREDENTIAL, self._credential)
        return open_channel(address, OPTIONS, sends, self._tls)

    def channel(self, address: str) -> grpc.aio.Channel:
        """The channel for the console's own calls to a process."""
        if address not in self._channels:
            self._channels[address] = self._connect(address)
        return self._channels[address]

    @asynccontextmanager
    async def calling(self, address: str, authorization: str) -> AsyncIterator[grpc.aio.Channel]:
        """A channel for calls in the name of the holder of an API key; "": of the console itself."""
        if not authorization:
            yield self.channel(address)
            return
        channel = self._connect(address, authorization)
        try:
            yield channel
        finally:
            await channel.close()

    def start(self) -> None:
        self._tasks = [BACKGROUND.start("fleet polling", self._run)]
        for router in self.view.routers:
            follow = partial(self.events.follow, router.address, self.channel(router.address))
            self._tasks.append(BACKGROUND.start("events of a router", follow))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def _run(self) -> None:
        turn = 0
        while True:
            routers, cache = await asyncio.gather(
                asyncio.gather(*(self._ask_router(router) for router in self.view.routers)),
                self._ask_cache(self.view.cache.address),
            )
            self.view = replace(self.view, routers=tuple(routers), cache=cache)
            if turn % _MODELS_EVERY == 0 or not self.view.models:
                await self._ask_models()
            turn += 1
            await asyncio.sleep(_ASK_SECONDS)

    async def _ask_router(self, last: ServiceView) -> ServiceView:
        stub = router_pb2_grpc.RouterServiceStub(self.channel(last.address))
        ring, problem = await ask(lambda: stub.GetRing(router_pb2.GetRingRequest(), timeout=_TIMEOUT))
        if ring is None:
            return ServiceView(last.address, problem, last.workers, last.answered_at)
        return ServiceView(last.address, "", tuple(ring.workers), time.time())

    async def _ask_cache(self, address: str) -> ServiceView:
        stub = cache_pb2_grpc.CacheServiceStub(self.channel(address))
        _, problem = await ask(lambda: stub.Stats(cache_pb2.StatsRequest(), timeout=_TIMEOUT))
        return ServiceView(address, problem)

    async def _ask_models(self) -> None:
        """Asks the first router that answers for its models, and its workers for theirs."""
        router = self.view.router
        if router is None:
            return
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(self.channel(router.address))
        index, _ = await ask(lambda: stub.RepositoryIndex(v2.RepositoryIndexRequest(), timeout=_TIMEOUT))
        if index is None:
            return
        described = await self._ask_workers([worker.address for worker in router.workers if worker.healthy])
        replicas: dict[tuple[str, str], list[ModelReplica]] = {}
        for answer in described:
            for served in answer.models:
                replicas.setdefault((served.name, served.version), []).append(ModelReplica(answer.worker_id, served))
        models = tuple(
            ModelView(
                model.name,
                model.version,
                model.state,
                model.reason,
                tuple(replicas.get((model.name, model.version), ())),
            )
            for model in index.models
        )
        failures = tuple(
            LoadFailure(answer.worker_id, failed.model, failed.version, failed.reason)
            for answer in described
            for failed in answer.failed
        )
        self.view = replace(self.view, models=models, failures=failures)

    async def _ask_workers(self, addresses: list[str]) -> list[inference_pb2.DescribeResponse]:
        """Asks each worker for its models. Omits workers that do not answer."""
        view = self.view
        kept = {*(router.address for router in view.routers), view.cache.address, *view.workers}
        for gone in self._channels.keys() - kept:
            BACKGROUND.once("closing of a channel", partial(self._channels.pop(gone).close, _GRACE_SECONDS))
        answers = await asyncio.gather(*(_describe(self.channel(address)) for address in addresses))
        return sorted((answer for answer in answers if answer is not None), key=lambda answer: answer.worker_id)


async def _describe(channel: grpc.aio.Channel) -> inference_pb2.DescribeResponse | None:
    stub = inference_pb2_grpc.InferenceWorkerServiceStub(channel)
    return (await ask(lambda: stub.Describe(inference_pb2.DescribeRequest(), timeout=_TIMEOUT)))[0]


async def ask(call: Callable[[], Awaitable[Response]]) -> tuple[Response | None, str]:
    """Makes a call. Returns the answer and "", or None and the reason as text."""
    try:
        return await call(), ""
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return None, "it does not answer: nothing listens there, or it is stopping"
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return None, "it did not answer in time"
        return None, f"{error.code().name}: {error.details()}"
