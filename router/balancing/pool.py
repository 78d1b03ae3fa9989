"""The workers to ask for each model, and how many requests each of them may have outstanding."""

from __future__ import annotations  # compiled by mypyc

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from router.balancing.member import Member
from router.transport.worker_load import LoadSum

# No worker takes more than this times its share of what the fleet has to do (docs/decisions/0005).
BALANCE = 1.25
# So few are never too many: that equal keys meet at their owner is worth more than an even spread of next to nothing.
FLOOR = 4


class Pool(LoadSum):
    """The workers to ask for a model, and what they have to do together.

    Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018): whoever is at its bound is passed
    over. The bounds add up to more than the load, so somebody always is below.
    """

    __slots__ = ("capacity", "members", "near")

    def __init__(self, members: Sequence[Member], zone: str) -> None:
        self.members = {member.address: member for member in members}
        # Those of the router's zone; all where it has none there.
        self.near = [member for member in members if member.zone == zone] or [*members]
        self.capacity = sum(member.capacity for member in members)
        super().__init__(sum(member.load.outstanding for member in members))

    def bound(self, member: Member) -> int:
        """How many requests the member may have outstanding, the next one included."""
        fair = (self.load + 1) * member.capacity / self.capacity
        return max(math.ceil(BALANCE * fair), int(FLOOR * member.ramp), 1)


class Pools(NamedTuple):
    """By name and version of a model; and those that each worker is in, by its address."""

    by_model: dict[tuple[str, str], Pool]
    by_worker: dict[str, list[Pool]]


def pools(members: Iterable[Member], is_far: Callable[[Member], bool], zone: str) -> Pools:
    """Whom to ask for each model: holders that answer well, else any; of these the near ones, else all; of these those
    that have it in memory, else all.
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
        near = [member for member in fit if not is_far(member)] or fit
        chosen = [member for member in near if model not in member.unloaded] or near
        key = tuple([member.address for member in chosen])
        if key not in made:
            pool = made[key] = Pool(chosen, zone)
            for member in chosen:
                assigned.by_worker.setdefault(member.address, []).append(pool)
        assigned.by_model[model] = made[key]
    return assigned
