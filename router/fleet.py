"""The workers this router knows: polled, ranked and skipped when they do not answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ringmesh.inference.v1 import inference_pb2

from router.catalog import Catalog, ModelEntry
from router.ring import Ring
from router.worker_link import WorkerLink, WorkerUnreachableError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
# Long enough for a worker whose event loop is busy, short enough for callers of a hung one.
POLL_TIMEOUT_SECONDS = 2.0


class Member:
    """A worker in the ring. `reason` says why it is passed over, "" while it is not."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.link = WorkerLink(address)
        self.worker_id = address
        self.reason = "not yet connected"
        self.models: tuple[inference_pb2.ModelVersion, ...] = ()
        self.held: frozenset[tuple[str, str]] = frozenset()
        # Ensembles of which it lacks a step.
        self.partly: frozenset[tuple[str, str]] = frozenset()
        # What it would have to load first.
        self.unloaded: frozenset[tuple[str, str]] = frozenset()

    @property
    def healthy(self) -> bool:
        """Whether to send it work."""
        return not self.reason

    def why_not(self, model: ModelEntry) -> str:
        """Why it would not be asked for `model`; "" where it would."""
        if self.reason:
            return self.reason
        key = (model.name, model.version)
        if key in self.partly:
            return "does not hold every step of the ensemble"
        return "" if key in self.held else "does not hold the model"


@dataclass(frozen=True, slots=True)
class FleetView:
    """What a request sees of the fleet: it never changes, a new one takes its place."""

    ring: Ring
    members: dict[str, Member]
    catalog: Catalog


class Fleet:
    """Polls the workers at `addresses`; `view` is swapped here and nowhere else.

    A worker stays in the ring when it stops answering: its keys go to the next in rank, and come back with it.
    `on_ready` hears whether anybody can be asked.
    """

    def __init__(self, addresses: Sequence[str], on_ready: Callable[[bool], None]) -> None:
        members = {address: Member(address) for address in addresses}
        self.view = FleetView(Ring(dict.fromkeys(members, 1.0)), members, Catalog([]))
        self._on_ready = on_ready
        self._polls: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to poll."""
        self._polls = [asyncio.create_task(self._poll(member)) for member in self.view.members.values()]

    def failed(self, member: Member, error: WorkerUnreachableError) -> None:
        """Passes the member over until it answers again."""
        if member.healthy:
            log.warning("worker %s is passed over: %s", member.worker_id, error)
            member.reason = str(error) or "unreachable"
            self._refresh()

    async def close(self) -> None:
        """Stops polling and disconnects."""
        for poll in self._polls:
            poll.cancel()
        await asyncio.gather(*(member.link.close() for member in self.view.members.values()))

    async def describe(self, member: Member) -> None:
        """Asks the worker now what it holds; the next request sees it."""
        try:
            description = await member.link.describe(POLL_TIMEOUT_SECONDS)
        except WorkerUnreachableError as error:
            self.failed(member, error)
            member.link.give_up()
        else:
            self._update(member, description)

    async def _poll(self, member: Member) -> None:
        while True:
            await self.describe(member)
            await asyncio.sleep(POLL_SECONDS)

    def _update(self, member: Member, description: inference_pb2.DescribeResponse) -> None:
        reason = "" if description.accepting else "draining"
        models = tuple(description.models)
        if reason == member.reason and models == member.models:
            return
        if not reason and not member.healthy:
            log.info("worker %s takes requests", description.worker_id)
        member.worker_id = description.worker_id
        member.reason = reason
        member.models = models
        member.held = frozenset((model.name, model.version) for model in models)
        member.partly = frozenset((model.name, model.version) for model in models if model.ensemble.not_runnable)
        member.unloaded = frozenset((model.name, model.version) for model in models if model.unloaded)
        member.link.forget_lanes(frozenset(model.digest for model in models))
        self._refresh()

    def _refresh(self) -> None:
        healthy = [member for member in self.view.members.values() if member.healthy]
        # With nobody healthy the last catalog stands: callers are told UNAVAILABLE, not that there is no such model.
        if healthy:
            catalog = Catalog(member.models for member in healthy)
            self.view = FleetView(self.view.ring, self.view.members, catalog)
        self._on_ready(bool(healthy))
