"""The pool of workers for each model, and how many requests each of them may have outstanding."""

from __future__ import annotations  # compiled by mypyc

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from router.balancing.member import Member
from router.transport.worker_load import LoadSum

# No worker takes more than this multiple of its share of the pool's load (docs/decisions/0005).
BALANCE = 1.25
# Every bound is at least this: at low load, keeping equal keys at their owner is worth more than an even spread.
FLOOR = 4


class Pool(LoadSum):
    """The workers for a model, and their total load.

    Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018): a worker at its bound is skipped. The
    bounds add up to more than the load, so one worker is always below its bound.
    """

    def __init__(self, members: Sequence[Member], zone: str) -> None:
        self.members = {member.address: member for member in members}
        # The workers in the router's zone; all if there are none.
        self.near = [member for member in members if member.zone == zone] or [*members]
        self.capacity = sum(member.capacity for member in members)
        super().__init__(sum(member.load.outstanding for member in members))

    def bound(self, member: Member) -> int:
        """How many requests the member may have outstanding, the next one included."""
        fair = (self.load + 1) * member.capacity / self.capacity
        return max(math.ceil(BALANCE * fair), int(FLOOR * member.ramp), 1)


class Pools(NamedTuple):
    """The pool of each model, by its name and version, and the pools that each worker is in, by its address."""

    by_model: dict[tuple[str, str], Pool]
    by_worker: dict[str, list[Pool]]


def pools(members: Iterable[Member], region: str, zone: str) -> Pools:
    """The pools for all models, for a router in `region` and `zone`.

    A pool has the workers that hold the model and are not ejected, else all holders; of these the near ones, else all;
    of these the ones with the model in memory, else all.
    """
    holders: dict[tuple[str, str], list[Member]] = {}
    for member in members:
        if member.healthy:
            for model in member.held:
                if model not in member.partly:
                    holders.setdefault(model, []).append(member)
    made: dict[tuple[str, ...], Pool] = {}
    assigned = Pools({}, {})
    for model, of_model in holders.items():
        fit = [member for member in of_model if not member.ejected] or of_model
        near = [member for member in fit if not member.is_far(region)] or fit
        chosen = [member for member in near if model not in member.unloaded] or near
        key = tuple([member.address for member in chosen])
        if key not in made:
            pool = made[key] = Pool(chosen, zone)
            for member in chosen:
                assigned.by_worker.setdefault(member.address, []).append(pool)
        assigned.by_model[model] = made[key]
    return assigned
