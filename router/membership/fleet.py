"""The workers known to this router: membership, health, the models they hold, and the ring over them."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ringmesh.inference.v1 import inference_pb2

from router.accounting.meter import type_of_worker
from router.balancing.catalog import Catalog
from router.balancing.member import Listing, Member
from router.balancing.pool import pools
from router.balancing.ring import Ring
from router.balancing.view import FleetView
from router.membership.decisions import missed_decisions, newest_decisions
from router.membership.discovery import Watch
from router.membership.events import Event, MembershipEvents
from router.membership.membership import Membership
from router.membership.outliers import Outliers
from router.membership.slow_start import SlowStart
from router.membership.worker_description import InvalidDescriptionError, check_description
from router.transport.grpc_channel import GrpcChannel
from router.transport.worker_client import (
    NotSentError,
    OpenChannel,
    WorkerBusyError,
    WorkerClient,
    WorkerUnreachableError,
)
from router.transport.worker_load import WorkerLoad
from services.runtime.telemetry.metrics import Counter, Family, Sample
from services.runtime.telemetry.recent import forgotten
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

_WORKER = ("worker",)
HEALTHY = Family(
    "ringmesh_ring_member_healthy", "gauge", "1 if the router sends requests to the worker, 0 otherwise", _WORKER
)
SHARE = Family("ringmesh_ring_member_share_ratio", "gauge", "share of the key space that the worker owns", _WORKER)
LOAD = Family(
    "ringmesh_ring_member_in_flight", "gauge", "unanswered requests that this router sent to the worker", _WORKER
)
EJECTIONS = Family(
    "ringmesh_ejections_total", "counter", "times a worker was ejected for answering worse than others", _WORKER
)

TICK_SECONDS = 0.25
POLL_SECONDS = 0.5
# Maximum rate of polls: each worker of a large fleet is polled less often. A poll costs about 200 µs on the router.
MOST_POLLS_A_SECOND = 120
# Time for a worker to describe itself, or at least to answer a ping.
POLL_TIMEOUT_SECONDS = 2.0
# A worker that answers pings but reports nothing for longer than this hangs.
MOST_BUSY_SECONDS = 30.0
_RETIRE_SECONDS = 30.0


class Fleet:
    """Keeps `view` current; only this class replaces it.

    A worker that stops answering stays in the ring: its keys go to the next in rank and return when it recovers. It
    leaves the ring when the sources no longer list it. `on_ready` is called with whether any worker is healthy.
    `region` and `zone` are the router's, "" if they do not matter. `clock` in seconds. `isolates` is as in Catalog.
    """

    def __init__(
        self,
        listings: Sequence[Listing],
        on_ready: Callable[[bool], None],
        *,
        clock: Callable[[], float],
        sources: Mapping[str, Watch] | None = None,
        region: str = "",
        zone: str = "",
        open_channel: OpenChannel = GrpcChannel,
        isolates: bool = False,
    ) -> None:
        self.events = MembershipEvents()
        self._ejections = Counter(EJECTIONS)
        self._on_ready = on_ready
        self._clock = clock
        # How often models were loaded or unloaded through a router, as far as this one has heard.
        self._changes = 0
        self._sources = sources or {}
        self._region = region
        self._zone = zone
        self._open_channel = open_channel
        self._isolates = isolates
        self._membership = Membership(clock)
        self.outliers = Outliers(clock)
        self._slow_start = SlowStart(clock)
        self._members: dict[str, Member] = {}
        self._gone: dict[str, Member] = {}
        self._listed: Mapping[str, Listing] = {}
        self._polls: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_ring: Mapping[str, tuple[float, bool]] = {}
        self._building: asyncio.Task[None] | None = None
        self._started = False
        self._membership.report("settings", listings)
        self._follow_membership()
        self._in_ring = self._ring_members()
        self.view = self._view(*_rings(self._in_ring), Catalog([]))

    def start(self) -> None:
        self._started = True
        for member in self._members.values():
            self._start_polling(member)
        for name, watch in self._sources.items():
            self._tasks.add(BACKGROUND.start(f"discovery by {name}", partial(watch, partial(self._reported, name))))
        self._tasks.add(BACKGROUND.start("fleet tick", self._tick))

    def close(self) -> None:
        for task in (*self._polls.values(), *self._tasks):
            task.cancel()
        self.events.close()
        for member in self._members.values():
            member.link.close()

    def samples(self) -> Iterator[Sample]:
        for member in self.view.members.values():
            worker = (member.worker_id,)
            yield Sample(HEALTHY, worker, member.healthy and not member.ejected)
            yield Sample(SHARE, worker, self.view.share(member))
            yield Sample(LOAD, worker, member.load.in_flight)
        yield forgotten("usual times", self.outliers.usual)
        yield from self._ejections.samples()

    def failed(self, member: Member, error: WorkerUnreachableError) -> None:
        """Records a lost attempt: the member gets no requests until it answers again."""
        if not isinstance(error, NotSentError):
            self.outliers.failed(member.address)
        self._unreachable(member, error)

    def answered(self, member: Member, model_digest: bytes, seconds: float) -> None:
        """Records the duration of an attempt. It was answered, or given up because another was faster."""
        self.outliers.answered(member.address, model_digest, seconds)

    @property
    def members(self) -> list[Member]:
        """The current members; `view` has them once the ring is built, and those that left until then."""
        return list(self._members.values())

    @property
    def poll_seconds(self) -> float:
        """The time between two polls of a worker."""
        return max(POLL_SECONDS, len(self._members) / MOST_POLLS_A_SECOND)

    async def describe_all(self) -> bool:
        """Describes all healthy workers, because a router has loaded or unloaded models.

        Returns False if a worker stays healthy without a description, because it is busy: it may hold other models
        than the router believes. The next call asks it again; after MOST_BUSY_SECONDS it gets no requests.
        """
        self._changes += 1
        asked = [member for member in self._members.values() if member.healthy]
        described = await asyncio.gather(*(self.describe(member) for member in asked))
        now = self._clock()
        busy = False
        for member, is_described in zip(asked, described, strict=True):
            if is_described:
                continue
            if member.unsure_since is None:
                member.unsure_since = now
            if now - member.unsure_since < MOST_BUSY_SECONDS:
                busy = True
            else:
                self._unreachable(member, WorkerUnreachableError("it is too busy to say which models it holds"))
        if not any(member.healthy for member in self._members.values()):
            # Nobody says what the models are now, so cached answers of the last ones are not given either.
            self.view = self._view(self.view.ring, self.view.far, Catalog([]))
        return not busy

    async def describe(self, member: Member) -> bool:
        """Updates the member from a new description of the worker; the next request sees the result.

        Returns False if the member stays as it is, because the worker is busy.
        """
        try:
            known, description = await self._ask(member)
        except WorkerUnreachableError as error:
            if isinstance(error, WorkerBusyError) and self._may_be_busy(member):
                return False
            self._unreachable(member, error)
            member.link.give_up()
            return True
        if self._members.get(member.address) is not member:
            return True  # it has left meanwhile
        member.busy_since = member.unsure_since = None
        same = description.version != 0 and description.version == known
        try:
            check_description(description, member.models if same else description.models)
        except InvalidDescriptionError as invalid:
            reason = f"worker {member.worker_id} sent an invalid description: {invalid}"
            self._unreachable(member, WorkerUnreachableError(reason))
            member.reason = reason
        else:
            self._update(member, description, same=same)
        return True

    async def _ask(self, member: Member) -> tuple[int, inference_pb2.DescribeResponse]:
        """(the version that the worker was told to be known, its description). Raises WorkerUnreachableError."""
        while True:
            changes, known = self._changes, member.version
            description = await member.link.describe(POLL_TIMEOUT_SECONDS, known)
            if changes == self._changes:  # else it may be from before the change
                return known, description

    def _may_be_busy(self, member: Member) -> bool:
        """Whether a worker that answers pings but reports nothing stays healthy, for up to MOST_BUSY_SECONDS."""
        now, reports = self._clock(), member.load.reports
        if member.busy_since is None or reports != member.busy_reports:
            member.busy_since, member.busy_reports = now, reports
        return now - member.busy_since < MOST_BUSY_SECONDS

    def _unreachable(self, member: Member, error: WorkerUnreachableError) -> None:
        reason = str(error) or "unreachable"
        if member.healthy:
            log.warning("worker %s gets no requests: %s", member.worker_id, reason)
            self.events.publish(Event.KIND_EJECTED, member, reason=reason)
            member.reason = reason
            self._refresh()
            member.wake.set()
        elif member.reason == "draining":
            member.reason = reason

    async def _poll(self, member: Member) -> None:
        reports = -1
        woken = -POLL_SECONDS
        loop = asyncio.get_running_loop()
        while True:
            load = member.load
            # A load report with the same version replaces a description: nothing has changed.
            if not member.healthy or load.reports == reports or load.version != member.version or not load.version:
                await self.describe(member)
            reports = load.reports
            with suppress(TimeoutError):
                async with asyncio.timeout(self.poll_seconds * random.uniform(0.9, 1.1)):
                    await member.wake.wait()
                # At most one such wake-up per POLL_SECONDS: a worker that answers polls but loses every request would
                # else be restored after each loss.
                await asyncio.sleep(woken + POLL_SECONDS - loop.time())
                woken = loop.time()
            member.wake.clear()

    async def _check(self, member: Member) -> None:
        """Pings a worker whose answer is due, and closes its link if it does not answer."""
        if not await member.link.is_alive():
            self._unreachable(member, WorkerUnreachableError("it does not answer a ping"))
            member.link.give_up()

    def _update(self, member: Member, description: inference_pb2.DescribeResponse, *, same: bool) -> None:
        models = member.models if same else tuple(description.models)
        member.version = description.version
        before = (member.failed, member.decisions)
        if not same:
            member.decisions, member.failed = tuple(description.decisions), tuple(description.failed)
        reason = "" if description.accepting else "draining"
        weight, region = description.weight or member.weight, description.region or member.region
        moved = (weight, region) != (member.weight, member.region)
        member.weight, member.region, member.zone = weight, region, description.zone or member.zone
        member.worker_id = description.worker_id
        if moved:
            self._rebuild()
        if (reason, models, before) == (member.reason, member.models, (member.failed, member.decisions)):
            return
        restored = not reason and not member.healthy
        if reason and reason != member.reason:
            self.events.publish(Event.KIND_DRAINING, member)
        member.reason = reason
        if restored:
            log.info("worker %s takes requests", member.worker_id)
            if not same:  # a new process, not the one that was lost
                self._slow_start.begin(member.address)
            # Before it gets requests again: it may have failed often enough to be ejected.
            self._judge()
            if not member.ejected:
                self.events.publish(Event.KIND_RESTORED, member)
        self._holds(member, models)
        self._refresh()

    def _holds(self, member: Member, models: tuple[inference_pb2.ModelVersion, ...]) -> None:
        if models == member.models:
            return
        before, held = ({(model.name, model.version) for model in listed} for listed in (member.models, models))
        member.models = models
        member.worker_type = type_of_worker(model.provider for model in models)
        member.partly = {
            (model.name, model.version): model.ensemble.not_runnable for model in models if model.ensemble.not_runnable
        }
        member.unloaded = frozenset((model.name, model.version) for model in models if model.unloaded)
        member.link.forget_queues(frozenset(model.digest for model in models))
        for name, version in sorted(held - before):
            self.events.publish(Event.KIND_MODEL_GAINED, member, model=f"{name}/{version}")
        for name, version in sorted(before - held):
            self.events.publish(Event.KIND_MODEL_LOST, member, model=f"{name}/{version}")

    def _refresh(self) -> None:
        # Decisions of workers that cannot be reached count too: what they have replaced does not return.
        newest = newest_decisions(self._members.values())
        held: list[list[inference_pb2.ModelVersion]] = []
        failed: list[inference_pb2.FailedVersion] = []
        lost: list[inference_pb2.ModelVersion] = []
        for member in self._members.values():
            missed = missed_decisions(member, newest)
            models = [model for model in member.models if model.name not in missed]
            # An ensemble of which the worker has an old step is run step by step.
            member.held = frozenset(
                [(model.name, model.version) for model in models if missed.keys().isdisjoint(_steps(model))]
            )
            failed += [failure for failure in member.failed if failure.model not in missed]
            if member.healthy:
                held.append(models)
            else:
                lost += models
        # If no worker is healthy, the last catalog stays: its answers may be cached.
        catalog = Catalog(held, failed, lost, isolates=self._isolates) if held else self.view.catalog
        self.view = self._view(self.view.ring, self.view.far, catalog)
        self._on_ready(bool(held))

    def _view(self, ring: Ring, far: Ring, catalog: Catalog) -> FleetView:
        # A member that left is in the ring until the next one is built.
        known = {**self._gone, **self._members}
        members = {address: known[address] for address in (*ring.members, *far.members)}
        assigned = pools(members.values(), self._region, self._zone)
        for address, member in members.items():
            member.load.sums = tuple(assigned.by_worker.get(address, ()))
        return FleetView(ring, members, catalog, far, assigned.by_model)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._follow_membership()
            self._judge()
            for member in self._members.values():
                if member.link.is_silent:
                    self._once("check of a worker", partial(self._check, member))

    def _judge(self) -> None:
        ejected = self.outliers.ejected({address: member.healthy for address, member in self._members.items()})
        changed = False
        for member in self._members.values():
            reason = ejected.get(member.address, "")
            if reason and not member.ejected:
                log.warning("worker %s is %s", member.worker_id, reason)
                self._ejections.add(member.worker_id)
                self.events.publish(Event.KIND_EJECTED, member, reason=reason)
            elif member.ejected and not reason:
                self._slow_start.begin(member.address)
                if member.healthy:
                    self.events.publish(Event.KIND_RESTORED, member)
            ramp = self._slow_start.ramp(member.address)
            changed = changed or (reason, ramp) != (member.ejected, member.ramp)
            member.ejected, member.ramp = reason, ramp
        if changed:
            self.view = self._view(self.view.ring, self.view.far, self.view.catalog)

    def _reported(self, source: str, listings: Iterable[Listing]) -> None:
        self._membership.report(source, listings)
        self._follow_membership()

    def _follow_membership(self) -> None:
        """Adds and removes members; the ring follows when it is rebuilt."""
        found = self._membership.members(lambda address: self._members[address].healthy)
        for address, listing in found.items():
            if address not in self._members:
                self._join(listing)
            elif listing != self._listed.get(address):
                self._once("description of a worker", partial(self.describe, self._members[address]))
        self._listed = found
        for address in [address for address in self._members if address not in found]:
            self._leave(self._members.pop(address))
        if self._ring_members() != self._in_ring:
            self._rebuild()

    def _join(self, listing: Listing) -> None:
        load = WorkerLoad()
        link = WorkerClient(listing.address, load, self._open_channel)
        member = self._members[listing.address] = Member(listing, link, load)
        self.events.publish(Event.KIND_JOINED, member)
        if self._started:
            self._start_polling(member)

    def _leave(self, member: Member) -> None:
        log.info("worker %s left", member.worker_id)
        self.events.publish(Event.KIND_LEFT, member)
        member.reason = "left the fleet"
        self._gone[member.address] = member
        self._refresh()
        self._polls.pop(member.address).cancel()
        self.outliers.forget(member.address)
        self._slow_start.forget(member.address)
        self._once("disconnection of a worker", partial(_retire, member))

    def _start_polling(self, member: Member) -> None:
        self._polls[member.address] = BACKGROUND.start("poll of a worker", partial(self._poll, member))

    def _ring_members(self) -> Mapping[str, tuple[float, bool]]:
        return {address: (member.weight, member.is_far(self._region)) for address, member in self._members.items()}

    def _rebuild(self) -> None:
        """Builds the ring on a thread, because it takes long for a large fleet. One task at a time does this."""
        if self._started and self._building is None:
            self._building = self._once("building of the ring", self._build)

    async def _build(self) -> None:
        try:
            while (wanted := self._ring_members()) != self._in_ring:
                ring, far = await asyncio.to_thread(_rings, wanted)
                self._in_ring = wanted
                if self._members.keys() >= wanted.keys():
                    self.view = self._view(ring, far, self.view.catalog)
                    self._gone.clear()
        finally:
            self._building = None

    def _once(self, name: str, work: Callable[[], Coroutine[Any, Any, object]]) -> asyncio.Task[None]:
        task = BACKGROUND.once(name, work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _steps(model: inference_pb2.ModelVersion) -> list[str]:
    return [step.model_name for step in model.ensemble.config.ensemble_scheduling.step]


def _rings(members: Mapping[str, tuple[float, bool]]) -> tuple[Ring, Ring]:
    """The rings over the near and over the far members. `members`: (weight, is far) by address."""
    near = Ring({address: weight for address, (weight, far) in members.items() if not far})
    return near, Ring({address: weight for address, (weight, far) in members.items() if far})


async def _retire(member: Member) -> None:
    """Disconnects when the member's requests have ended, or after _RETIRE_SECONDS."""
    for _ in range(int(_RETIRE_SECONDS / TICK_SECONDS)):
        if not member.load.in_flight:
            break
        await asyncio.sleep(TICK_SECONDS)
    member.link.close()
