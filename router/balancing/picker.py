"""Orders the workers for a request, and gives the reason for each worker that is skipped.

Depends only on the fleet view, the model and the ring hash, so `Explain` shows what the dispatcher would do.
"""

from __future__ import annotations  # compiled by mypyc

import random
from collections.abc import Iterator

from router.balancing.catalog import ModelEntry
from router.balancing.member import Member
from router.balancing.pool import Pool
from router.balancing.ring import Ring
from router.balancing.view import FleetView


class Candidate:
    """A worker in the order for one request. `reason`: why it is skipped; "" if it is not.

    `rank`: its rank on the ring, 0 for the owner. `bound`: how many requests it may have outstanding to take this one;
    0: load does not matter. Workers at their bound come after all others in the pool.
    """

    def __init__(self, member: Member, rank: int, reason: str, bound: int = 0) -> None:
        self.member = member
        self.rank = rank
        self.reason = reason
        self.bound = bound

    @property
    def is_full(self) -> bool:
        return 0 < self.bound <= self.member.load.outstanding


def candidates(
    view: FleetView,
    model: ModelEntry,
    ring_hash: bytes,
    *,
    sticky: bool = False,
    put_off: list[Candidate] | None = None,
) -> Iterator[Candidate]:
    """Every worker of the fleet once, in the order of preference for `ring_hash` (b"": any worker).

    `sticky`: the request needs the state of its owner, so load does not change the order. The order is generated
    lazily: the first worker is the cheapest to find, and later ones reflect the state of the fleet at that moment.
    Workers at their bound are appended to `put_off` as they are found.
    """
    pool = view.pool(model)
    put_off = [] if put_off is None else put_off
    others = []
    order = _by_rank(view, pool, ring_hash) if ring_hash or pool is None else _by_wait(view, pool)
    for rank, member in enumerate(order):
        reason = member.can_run(model).reason
        if reason or sticky or pool is None:
            yield Candidate(member, rank, reason)
        elif member.address not in pool.members:
            others.append(Candidate(member, rank, ""))
        elif (candidate := Candidate(member, rank, "", pool.bound(member))).is_full:
            put_off.append(candidate)
        else:
            yield candidate
    put_off.sort(key=lambda candidate: candidate.member.load.outstanding / candidate.member.capacity)
    yield from put_off
    others.sort(key=lambda candidate: bool(candidate.member.ejected))
    yield from others


def _by_rank(view: FleetView, pool: Pool | None, ring_hash: bytes) -> Iterator[Member]:
    """The ring's order, near before far. Beyond its ranks, workers in the pool come before the others."""
    ring_hash = ring_hash or random.randbytes(2)
    for ring in (view.ring, view.far):
        ranked = ring.ranked(ring_hash)
        for address in ranked:
            yield view.members[address]
        if len(ranked) < len(ring.members):
            yield from _past_the_ranks(view, ring, pool, ring_hash, len(ranked))


def _past_the_ranks(view: FleetView, ring: Ring, pool: Pool | None, ring_hash: bytes, ranks: int) -> Iterator[Member]:
    rest = [view.members[address] for address in ring.order(ring_hash)[ranks:]]
    preferred = pool.members if pool is not None else {}
    yield from (member for member in rest if member.address in preferred)
    yield from (member for member in rest if member.address not in preferred)


def _by_wait(view: FleetView, pool: Pool) -> Iterator[Member]:
    """The better of two random members (Mitzenmacher 2001) of the router's own zone, then the other, then the rest."""
    near = pool.near
    first = second = near[int(random.random() * len(near))]
    if len(near) > 1:
        while second is first:
            second = near[int(random.random() * len(near))]
        if _wait(second) < _wait(first):
            first, second = second, first
    yield first
    if second is not first:
        yield second
    for members in (pool.members, view.members):
        rest = [member for address, member in members.items() if members is pool.members or address not in pool.members]
        random.shuffle(rest)
        yield from (member for member in rest if member is not first and member is not second)


def _wait(member: Member) -> tuple[float, float]:
    """The estimated wait; ties are resolved by the outstanding requests."""
    return member.load.wait_us / member.ramp, (member.load.outstanding + 1) / member.capacity
