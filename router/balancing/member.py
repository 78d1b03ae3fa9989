"""One worker and its state as known to this router."""

from __future__ import annotations  # compiled by mypyc

import asyncio
from dataclasses import dataclass
from typing import Final, Protocol

from ringmesh.inference.v1 import inference_pb2

from router.accounting.meter import CPU
from router.balancing.catalog import ModelEntry
from router.transport.worker_client import EnvelopeItem
from router.transport.worker_load import WorkerLoad
from services.runtime.verdict import YES, Verdict

_NOT_HELD: Final = Verdict("does not hold the model")


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


class _Link(Protocol):
    """WorkerClient, or a fake in tests: compiled code accepts another class only through a protocol."""

    def send(self, model_digest: bytes, item: EnvelopeItem) -> None: ...
    def withdraw(self, item: EnvelopeItem) -> None: ...
    async def describe(self, seconds: float, known_version: int) -> inference_pb2.DescribeResponse: ...
    async def call(self, method: str, request: bytes, seconds: float) -> bytes: ...
    @property
    def is_silent(self) -> bool: ...
    async def is_alive(self) -> bool: ...
    def give_up(self) -> None: ...
    def forget_queues(self, model_digests: frozenset[bytes]) -> None: ...
    def close(self) -> None: ...


class Member:
    """A worker in the ring. Only the fleet writes to it.

    `reason`: why it cannot take requests; "" if it can. `ejected`: why it should not take requests while others can,
    because it answers badly; "" if it should. `ramp`: factor of its weight, below 1 during slow start.
    """

    def __init__(self, listing: Listing, link: _Link, load: WorkerLoad) -> None:
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
        # As the ledger prices it.
        self.worker_type = CPU
        # Versions that the worker could not load.
        self.failed: tuple[inference_pb2.FailedVersion, ...] = ()
        # Versions that it may be asked for: those that the fleet has not replaced meanwhile.
        self.held: frozenset[tuple[str, str]] = frozenset()
        # Ensembles that the worker cannot run whole, and why: a step is missing or does not fit.
        self.partly: dict[tuple[str, str], str] = {}
        # Models that the worker holds but would have to load into memory first.
        self.unloaded: frozenset[tuple[str, str]] = frozenset()
        # Since when it answers pings but reports nothing, and its number of reports by then.
        self.busy_since: float | None = None
        self.busy_reports = 0
        # Since when it has been too busy to describe itself after models were loaded or unloaded through a router.
        self.unsure_since: float | None = None

    @property
    def healthy(self) -> bool:
        return not self.reason

    @property
    def capacity(self) -> float:
        """The worker's weight, reduced during slow start."""
        return self.weight * self.ramp

    def is_far(self, region: str) -> bool:
        """Whether the worker is outside `region`; never if one of the two has no region."""
        return bool(region and self.region and self.region != region)

    def can_run(self, model: ModelEntry) -> Verdict:
        if self.reason:
            return Verdict(self.reason)
        key = (model.name, model.version)
        if key in self.partly:
            return Verdict(f"cannot run the ensemble: {self.partly[key]}")
        return YES if key in self.held else _NOT_HELD
