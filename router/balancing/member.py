"""One worker, as this router knows it."""

from __future__ import annotations  # compiled by mypyc

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ringmesh.inference.v1 import inference_pb2

from router.balancing.catalog import ModelEntry
from router.transport.worker_client import Outcome, Sent, Work
from router.transport.worker_load import WorkerLoad


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source knows of a worker. Beyond the address it may know nothing: the worker says it itself."""

    address: str
    worker_id: str = ""
    region: str = ""
    zone: str = ""
    weight: float = 1.0
    # What changes while it runs, where the source tells: a reason to ask the worker.
    accepting: bool = True
    digests: frozenset[bytes] = frozenset()


class Link(Protocol):
    """The way to a worker; WorkerClient is the real one and describes the methods."""

    def send(self, model_digest: bytes, work: Work, done: Callable[[Outcome], None]) -> Sent:
        """Runs the request there; `done` hears the outcome."""

    def withdraw(self, sent: Sent) -> None:
        """Nobody waits for it any more."""

    async def describe(self, seconds: float, known_version: int) -> inference_pb2.DescribeResponse:
        """What the worker holds. Raises WorkerUnreachableError."""

    async def call(self, method: str, request: bytes, seconds: float) -> bytes:
        """One call of another method. Raises WorkerUnreachableError or the worker's own error."""

    @property
    def is_silent(self) -> bool:
        """Whether `is_alive` should be asked."""

    async def is_alive(self) -> bool:
        """Whether the worker's engine answers."""

    def give_up(self) -> None:
        """Ends what is under way."""

    def forget_queues(self, model_digests: frozenset[bytes]) -> None:
        """Drops the idle queues of models that are not in `model_digests`."""

    async def close(self) -> None:
        """Ends what is under way and disconnects."""


class Member:
    """A worker in the ring, written by the fleet alone.

    `reason` says why it cannot be asked, "" where it can. `ejected` says why it should not be while others can: it
    answers badly. `ramp` is the part of its weight that counts towards its load, below 1 while it starts slowly.
    """

    def __init__(self, listing: Listing, link: Link, load: WorkerLoad) -> None:
        self.address = listing.address
        self.worker_id = listing.worker_id or listing.address
        self.region = listing.region
        self.zone = listing.zone
        self.weight = listing.weight
        self.link = link
        self.load = load
        self.reason = "not yet connected"
        # Set where it is to be asked soon how it is.
        self.wake = asyncio.Event()
        self.ejected = ""
        self.ramp = 1.0
        # The worker's version of `models`.
        self.version = 0
        # Of each model that was loaded or unloaded there by request: the last time.
        self.decisions: tuple[inference_pb2.ModelDecision, ...] = ()
        self.models: tuple[inference_pb2.ModelVersion, ...] = ()
        # Versions that it could not load.
        self.failed: tuple[inference_pb2.FailedVersion, ...] = ()
        self.held: frozenset[tuple[str, str]] = frozenset()
        # Ensembles that it cannot run whole, and why: a step is missing or does not fit.
        self.partly: dict[tuple[str, str], str] = {}
        # What it would have to load first.
        self.unloaded: frozenset[tuple[str, str]] = frozenset()

    @property
    def healthy(self) -> bool:
        """Whether it can be sent work."""
        return not self.reason

    @property
    def capacity(self) -> float:
        """Its weight, as far as it has started."""
        return self.weight * self.ramp

    def why_not(self, model: ModelEntry) -> str:
        """Why it cannot be asked for `model`; "" where it can."""
        if self.reason:
            return self.reason
        key = (model.name, model.version)
        if key in self.partly:
            return f"cannot run the ensemble: {self.partly[key]}"
        return "" if key in self.held else "does not hold the model"
