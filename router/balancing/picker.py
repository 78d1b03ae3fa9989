"""Whom a request is sent to: the workers in the order to ask them, and why some are passed over.

A pure function of what is known of the fleet, so that `Explain` says what the dispatcher would do.
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
    """A worker in the order for one request. `reason` says why it is passed over, "" where it is asked.

    `rank` is its place on the ring, 0 for the owner. `bound` is how much it may have outstanding for this request; 0
    where load is no matter. Whoever is at its bound is asked after all that are not.
    """

    __slots__ = ("bound", "member", "rank", "reason")

    def __init__(self, member: Member, rank: int, reason: str, bound: int = 0) -> None:
        self.member = member
        self.rank = rank
        self.reason = reason
        self.bound = bound

    @property
    def is_full(self) -> bool:
        """Whether load is why it was put off."""
        return 0 < self.bound <= self.member.load.outstanding


def candidates(
    view: FleetView,
    model: ModelEntry,
    place: bytes,
    *,
    sticky: bool = False,
    put_off: list[Candidate] | None = None,
) -> Iterator[Candidate]:
    """Every worker of the fleet once, in the order to ask them for `place` on the ring; b"" for any place.

    `sticky`: the request belongs to what its owner remembers, so load is no reason to go elsewhere. The order is made
    as it is read: the first costs least, and those that follow see the fleet of that moment. `put_off` takes those
    that are at their bound, as they are found.
    """
    pool = view.pool(model)
    put_off = [] if put_off is None else put_off
    others = []
    order = _by_rank(view, pool, place) if place or pool is None else _by_wait(view, pool)
    for rank, member in enumerate(order):
        reason = member.why_not(model)
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


def _by_rank(view: FleetView, pool: Pool | None, place: bytes) -> Iterator[Member]:
    """The ring's order, near before far. Past the ranks, those that can be asked come before those that cannot."""
    place = place or random.randbytes(2)
    for ring in (view.ring, view.far):
        ranked = ring.ranked(place)
        for address in ranked:
            yield view.members[address]
        if len(ranked) < len(ring.members):
            yield from _past_the_ranks(view, ring, pool, place, len(ranked))


def _past_the_ranks(view: FleetView, ring: Ring, pool: Pool | None, place: bytes, ranks: int) -> Iterator[Member]:
    rest = [view.members[address] for address in ring.order(place)[ranks:]]
    asked = pool.members if pool is not None else {}
    yield from (member for member in rest if member.address in asked)
    yield from (member for member in rest if member.address not in asked)


def _by_wait(view: FleetView, pool: Pool) -> Iterator[Member]:
    """The better of two at random (Mitzenmacher 2001), from the router's own zone; then the other; then any."""
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
    """Estimated, and where that says nothing, by what is outstanding."""
    return member.load.wait_us / member.ramp, (member.load.outstanding + 1) / member.capacity
