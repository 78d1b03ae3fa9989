"""One worker and its state as known to this router."""

from __future__ import annotations  # compiled by mypyc

import asyncio
from dataclasses import dataclass
from typing import Protocol

from ringmesh.inference.v1 import inference_pb2

from router.balancing.catalog import ModelEntry
from router.transport.worker_client import EnvelopeItem
from router.transport.worker_load import WorkerLoad


@dataclass(frozen=True, slots=True)
class Listing:
    """A source's entry for a worker. It may have only the address: the worker's description has the rest."""

    address: str
    worker_id: str = ""
    region: str = ""
    zone: str = ""
    weight: float = 1.0
    # These change while the worker runs; if a source reports a change, the worker is asked for its description.
    accepting: bool = True
    digests: frozenset[bytes] = frozenset()


class Link(Protocol):
    """The link to a worker; WorkerClient is the real one and documents the methods."""

    def send(self, model_digest: bytes, item: EnvelopeItem) -> None:
        """Runs the request on the worker; calls `done` with the outcome."""

    def withdraw(self, item: EnvelopeItem) -> None:
        """Withdraws a request whose result is no longer needed."""

    async def describe(self, seconds: float, known_version: int) -> inference_pb2.DescribeResponse:
        """The worker's description. Raises WorkerUnreachableError."""

    async def call(self, method: str, request: bytes, seconds: float) -> bytes:
        """Calls another method. Raises WorkerUnreachableError or the worker's own error."""

    @property
    def is_silent(self) -> bool:
        """Whether `is_alive` should be called."""

    async def is_alive(self) -> bool:
        """Whether the worker's engine answers a ping."""

    def give_up(self) -> None:
        """Closes the link and ends the requests under way."""

    def forget_queues(self, model_digests: frozenset[bytes]) -> None:
        """Drops the idle queues of models that are not in `model_digests`."""

    def close(self) -> None:
        """Ends the requests under way and disconnects."""


class Member:
    """A worker in the ring. Only the fleet writes to it.

    `reason`: why it cannot take requests; "" if it can. `ejected`: why it should not take requests while others can,
    because it answers badly; "" if it should. `ramp`: factor of its weight, below 1 during slow start.
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
        # Set to poll the worker soon.
        self.wake = asyncio.Event()
        self.ejected = ""
        self.ramp = 1.0
        # The worker's version of `models`.
        self.version = 0
        # The last decision on each model that was loaded or unloaded there by request.
        self.decisions: tuple[inference_pb2.ModelDecision, ...] = ()
        self.models: tuple[inference_pb2.ModelVersion, ...] = ()
        # Versions that the worker could not load.
        self.failed: tuple[inference_pb2.FailedVersion, ...] = ()
        self.held: frozenset[tuple[str, str]] = frozenset()
        # Ensembles that the worker cannot run whole, and why: a step is missing or does not fit.
        self.partly: dict[tuple[str, str], str] = {}
        # Models that the worker holds but would have to load into memory first.
        self.unloaded: frozenset[tuple[str, str]] = frozenset()

    @property
    def healthy(self) -> bool:
        """Whether the worker can take requests."""
        return not self.reason

    @property
    def capacity(self) -> float:
        """The worker's weight, reduced during slow start."""
        return self.weight * self.ramp

    def is_far(self, region: str) -> bool:
        """Whether the worker is outside `region`; never if one of the two has no region."""
        return bool(region and self.region and self.region != region)

    def why_not(self, model: ModelEntry) -> str:
        """Why the worker cannot run `model`; "" if it can."""
        if self.reason:
            return self.reason
        key = (model.name, model.version)
        if key in self.partly:
            return f"cannot run the ensemble: {self.partly[key]}"
        return "" if key in self.held else "does not hold the model"
