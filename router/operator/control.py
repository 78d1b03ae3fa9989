"""Model management through the router: one call applies to every worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from google.protobuf.message import Message
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.keys.epochs import EVERYTHING, MODELS
from router.accounting.request_metrics import RequestMetrics
from router.balancing.member import Member
from router.membership.decisions import missed_decisions, newest_decisions
from router.membership.fleet import Fleet
from router.operator.agreement import LOAD_SECONDS, next_ns
from router.request.audit import Audit
from router.transport.worker_client import WorkerUnreachableError
from services.runtime.errors import InvalidArgumentError, NotFoundError, RingmeshError, UnavailableError
from services.runtime.oip.absent_model import unreachable
from services.runtime.oip.protocol import DECIDED_NS, full_name
from services.runtime.request_limits import check_list
from services.runtime.rpc.rpc import Context, Handler, unary

log = logging.getLogger(__name__)

_SECONDS = 10.0
# How many periods of polling it takes until each router has seen a change, with time for a slow answer.
_POLLS = 1.5

_MISSED = "the fleet has replaced or unloaded it, and this worker has yet to do so"

_SHARED_MEMORY = [
    f"{kind}SharedMemory{verb}" for kind in ("System", "Cuda") for verb in ("Status", "Register", "Unregister")
]


class FleetControl:
    """Handlers that call one worker, or call all workers and merge their answers.

    `announce` returns when the other routers have refreshed their descriptions of the workers, or if there is no Redis.
    It raises RingmeshError if they cannot be told.
    """

    def __init__(
        self, fleet: Fleet, requests: RequestMetrics, audit: Audit, announce: Callable[[], Awaitable[None]]
    ) -> None:
        self._announce = announce
        self._fleet = fleet
        self._requests = requests
        self._audit = audit

    def handlers(self) -> dict[str, Handler]:
        return {
            "ModelConfig": unary(v2.ModelConfigRequest, self._config),
            "ModelStatistics": unary(v2.ModelStatisticsRequest, self._statistics),
            "RepositoryIndex": unary(v2.RepositoryIndexRequest, self._index),
            "RepositoryModelLoad": unary(v2.RepositoryModelLoadRequest, self._load, check_list),
            "RepositoryModelUnload": unary(v2.RepositoryModelUnloadRequest, self._unload),
            **{
                method: unary(getattr(v2, f"{method}Request"), partial(self._to_all, method))
                for method in _SHARED_MEMORY
            },
        }

    async def hear(self, news: set[str]) -> bool:
        """Describes all healthy workers again if a router has loaded or unloaded models.

        `news`: scopes of purges and announcements. A purge of everything removes the news of that. Returns False if a
        worker is too busy for that: the news are not confirmed, and told again.
        """
        return news.isdisjoint((MODELS, EVERYTHING)) or await self._fleet.describe_all()

    async def _to_all(self, method: str, request: Message, _: Context) -> Any:
        """Calls all workers and returns the first answer; the answers are alike.

        Every worker on the caller's host must know a region, because a request may go to any of them.
        """
        return (await self._ask_all(method, request))[0][1]

    async def _config(self, request: v2.ModelConfigRequest, _: Context) -> v2.ModelConfigResponse:
        model = self._fleet.view.catalog.find(request.name, request.version)
        for member in self._healthy():
            if (model.name, model.version) in member.held:
                answer: v2.ModelConfigResponse = await self._ask(member, "ModelConfig", request)
                if reason := self._audit.may_cache(model, self._fleet.view.catalog).reason:
                    answer.config.parameters["ringmesh_cached"].string_value = f"no: {reason}"
                return answer
        raise unreachable(request.name)

    async def _statistics(self, request: v2.ModelStatisticsRequest, _: Context) -> v2.ModelStatisticsResponse:
        """Sums of the workers' statistics, plus this router's hits and misses."""
        if request.name:
            self._fleet.view.catalog.find(request.name, request.version)
        holders = [
            member
            for member in self._healthy()
            if not request.name or any(name == request.name for name, _version in member.held)
        ]
        answers = await asyncio.gather(*(self._ask(member, "ModelStatistics", request) for member in holders))
        sums: dict[tuple[str, str], v2.ModelStatistics] = {}
        for answer in answers:
            for stats in answer.model_stats:
                key = (stats.name, stats.version)
                if key in sums:
                    _add(sums[key], stats)
                else:
                    sums[key] = stats
        for stats in sums.values():
            self._requests.add_to(stats)
        return v2.ModelStatisticsResponse(model_stats=[sums[key] for key in sorted(sums)])

    async def _index(self, request: v2.RepositoryIndexRequest, _: Context) -> v2.RepositoryIndexResponse:
        """A model is READY if it is READY on one worker, or if it is an ensemble whose steps are on several workers.

        A reason names its workers unless all workers give the same one.
        """
        every = v2.RepositoryIndexRequest(repository_name=request.repository_name)
        answers = await self._ask_all("RepositoryIndex", every)
        newest = newest_decisions(self._fleet.members)
        lines: dict[tuple[str, str], v2.RepositoryIndexResponse.ModelIndex] = {}
        reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
        for member, answer in answers:
            missed = missed_decisions(member, newest)
            for line in answer.models:
                key = (line.name, line.version)
                if line.name in missed and line.state == "READY":
                    line.state, line.reason = "UNAVAILABLE", _MISSED
                if key not in lines or line.state == "READY":
                    lines[key] = line
                if line.reason:
                    reasons.setdefault(key, {}).setdefault(line.reason, []).append(member.worker_id)
        catalog = self._fleet.view.catalog
        for key, line in lines.items():
            remarks = [
                reason if len(workers) == len(answers) else f"{', '.join(sorted(workers))}: {reason}"
                for reason, workers in reasons.get(key, {}).items()
            ]
            name, version = key
            model = catalog.find(name, version) if version in catalog.versions.get(name, ()) else None
            if model is not None and not model.runnable:
                line.state = "UNAVAILABLE"
                remarks.append(f"no worker can run it: {model.runnable.reason}")
            elif model is not None and model.plan is not None:
                line.state = "READY"
            if model is not None and line.state == "READY" and (why := self._audit.may_cache(model, catalog).reason):
                remarks.append(f"not cached: {why}")
            line.reason = "; ".join(remarks)
        shown = [key for key in sorted(lines) if lines[key].state == "READY" or not request.ready]
        return v2.RepositoryIndexResponse(models=[lines[key] for key in shown])

    async def _load(self, request: v2.RepositoryModelLoadRequest, _: Context) -> v2.RepositoryModelLoadResponse:
        """Returns when every worker serves the new files and every router uses their digest in cache keys.

        Without Redis, other routers learn of them by their polls.
        """
        await self._change("RepositoryModelLoad", request)
        return v2.RepositoryModelLoadResponse()

    async def _unload(self, request: v2.RepositoryModelUnloadRequest, _: Context) -> v2.RepositoryModelUnloadResponse:
        name = request.model_name
        # A worker that failed to unload it before still holds it, but not for the catalog.
        if not any(model.name == name for member in self._reachable() for model in member.models):
            try:
                self._fleet.view.catalog.find(name, "")
            except NotFoundError:
                raise NotFoundError(f"model {name!r} is not loaded", field="model_name") from None
            except UnavailableError:
                pass  # a worker that cannot be reached may hold it
        await self._change("RepositoryModelUnload", request)
        return v2.RepositoryModelUnloadResponse()

    async def _change(
        self, method: str, request: v2.RepositoryModelLoadRequest | v2.RepositoryModelUnloadRequest
    ) -> None:
        """Applies a change on all workers. `Agreement` applies it later on workers that are unreachable now."""
        # A decision of another router may be newer than the last descriptions, and the clocks of routers differ.
        await asyncio.gather(*map(self._fleet.describe, self._reachable()))
        self._reachable()  # raises before anything has changed
        request.parameters[DECIDED_NS].int64_param = next_ns(self._fleet.members)
        try:
            await self._ask_all(method, request, LOAD_SECONDS)
        finally:  # also if only some workers applied it
            while not await self._fleet.describe_all():  # a busy worker is asked again, until it is taken for dead
                pass
            await self._tell_routers(method)

    async def _tell_routers(self, method: str) -> None:
        """Returns when the other routers know of a change. If they cannot be told, waits for their polls to see it."""
        try:
            await self._announce()
        except RingmeshError as error:
            log.warning("other routers learn of %s by their polls only: %s", method, error.message)
            await asyncio.sleep(_POLLS * self._fleet.poll_seconds)

    async def _ask_all(self, method: str, request: Message, seconds: float = _SECONDS) -> list[tuple[Member, Any]]:
        members = self._reachable()
        calls = (self._ask(member, method, request, seconds) for member in members)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return list(zip(members, answers, strict=True))

    async def _ask(self, member: Member, method: str, request: Message, seconds: float = _SECONDS) -> Any:
        """The response of one worker, as a message of the method's type."""
        try:
            data = await member.link.call(f"/{full_name(method)}", request.SerializeToString(), seconds)
            return getattr(v2, f"{method}Response").FromString(data)
        except WorkerUnreachableError as lost:
            raise UnavailableError(f"worker {member.worker_id}: {lost}", kind="worker_lost") from None
        except (InvalidArgumentError, NotFoundError) as error:
            raise error.within(f"worker {member.worker_id}") from None

    def _reachable(self) -> list[Member]:
        """The healthy workers. Raises UnavailableError if there are none."""
        if members := self._healthy():
            return members
        raise UnavailableError("no worker is connected; retry later", kind="no_worker")

    def _healthy(self) -> list[Member]:
        return [member for member in self._fleet.members if member.healthy]


def _add(to: v2.ModelStatistics, more: v2.ModelStatistics) -> None:
    to.last_inference = max(to.last_inference, more.last_inference)
    to.inference_count += more.inference_count
    to.execution_count += more.execution_count
    _add_durations(to.inference_stats, more.inference_stats)
    sizes = {batch.batch_size: batch for batch in to.batch_stats}
    for batch in more.batch_stats:
        if batch.batch_size in sizes:
            _add_durations(sizes[batch.batch_size], batch)
        else:
            to.batch_stats.append(batch)


def _add_durations(to: Message, more: Message) -> None:
    for field, value in more.ListFields():
        if isinstance(value, v2.StatisticDuration):
            duration = getattr(to, field.name)
            duration.count += value.count
            duration.ns += value.ns
