"""Whom a request is sent to: the workers in the order to ask them, and why some are passed over.

A pure function of what is known of the fleet, so that `Explain` says what the dispatcher would do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from router.catalog import ModelEntry
from router.fleet import FleetView, Member


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker in the order for one request, 0 its owner. `reason` says why it is passed over, "" where it is asked."""

    member: Member
    rank: int
    reason: str


def candidates(view: FleetView, model: ModelEntry, place: bytes, *, sticky: bool = False) -> Iterator[Candidate]:
    """Every worker of the fleet once, in the order to ask them for `place` on the ring; b"" for any place.

    `sticky`: the request belongs to what its owner remembers, so load is no reason to go elsewhere. The order is made
    as it is read: the first costs least, and those that follow see the fleet of that moment.
    """
    ranked = view.ring.ranked(place or os.urandom(2))
    # Past the ranks, for models that only a few of a large fleet hold.
    rest = (address for address in view.ring.members if address not in ranked)
    key = (model.name, model.version)
    unloaded = []
    for rank, address in enumerate(chain(ranked, rest)):
        member = view.members[address]
        candidate = Candidate(member, rank, member.why_not(model))
        if not sticky and key in member.unloaded:
            unloaded.append(candidate)
        else:
            yield candidate
    # They can answer too, when they have loaded it.
    yield from unloaded
