"""What each worker has to do, as this router knows: its own requests exactly, those of other routers as last told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ringmesh.inference.v1 import inference_pb2

if TYPE_CHECKING:
    from router.member import Member

# No worker takes more than this times its share of what the fleet has to do (docs/decisions/0005).
BALANCE = 1.25
# So few are never too many: that equal keys meet at their owner is worth more than an even spread of next to nothing.
FLOOR = 4


class WorkerLoad:
    """Requests outstanding at one worker; told to the pools that it is in."""

    __slots__ = ("_others", "in_flight", "interval_us", "outstanding", "pools", "reports", "version")

    def __init__(self) -> None:
        # Sent from here and not answered.
        self.in_flight = 0
        self.outstanding = 0
        # Mean time between its answers while it has work.
        self.interval_us = 0.0
        self.pools: tuple[Pool, ...] = ()
        # How many reports came, and the last one's version of what it holds.
        self.reports = 0
        self.version = 0
        self._others = 0

    @property
    def wait_us(self) -> float:
        """What a request sent now would wait."""
        return self.interval_us * self.outstanding

    def sent(self) -> None:
        """A request is on its way."""
        self.in_flight += 1
        self._add(1)

    def ended(self) -> None:
        """It was answered, or given up."""
        self.in_flight -= 1
        self._add(-1)

    def reported(self, report: inference_pb2.LoadReport, own: int) -> None:
        """The worker's own count, of which `own` were from here."""
        others = max(0, report.requests - own)
        self._add(others - self._others)
        self._others = others
        if report.requests:
            self.interval_us = report.estimated_wait_us / report.requests
        self.reports += 1
        self.version = report.version

    def _add(self, requests: int) -> None:
        self.outstanding += requests
        for pool in self.pools:
            pool.load += requests


class Pool:
    """The workers to ask for a model, and what they have to do together.

    Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018): whoever is at its bound is passed
    over. The bounds add up to more than the load, so somebody always is below.
    """

    __slots__ = ("capacity", "load", "members", "near")

    def __init__(self, members: Sequence[Member], zone: str) -> None:
        self.members = {member.address: member for member in members}
        # Those of the router's zone; all where it has none there.
        self.near = [member for member in members if member.zone == zone] or [*members]
        self.capacity = sum(member.capacity for member in members)
        self.load = sum(member.load.outstanding for member in members)

    def bound(self, member: Member) -> int:
        """How many requests the member may have outstanding, the next one included."""
        fair = (self.load + 1) * member.capacity / self.capacity
        return max(math.ceil(BALANCE * fair), int(FLOOR * member.ramp), 1)


def pools(members: Iterable[Member], is_far: Callable[[Member], bool], zone: str) -> dict[tuple[str, str], Pool]:
    """Whom to ask for each model: holders that answer well, else any; of these the near ones, else all; of these those
    that have it in memory, else all.

    From now on the loads of the members count towards these pools and no others.
    """
    holders: dict[tuple[str, str], list[Member]] = {}
    for member in members:
        member.load.pools = ()
        if member.healthy:
            for model in member.held:
                if model not in member.partly:
                    holders.setdefault(model, []).append(member)
    made: dict[tuple[str, ...], Pool] = {}
    by_model = {}
    for model, of_model in holders.items():
        fit = [member for member in of_model if not member.ejected] or of_model
        near = [member for member in fit if not is_far(member)] or fit
        chosen = [member for member in near if model not in member.unloaded] or near
        key = tuple([member.address for member in chosen])
        if key not in made:
            pool = made[key] = Pool(chosen, zone)
            for member in chosen:
                member.load.pools = (*member.load.pools, pool)
        by_model[model] = made[key]
    return by_model
