"""The fleet as one request sees it."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Mapping
from dataclasses import dataclass, field

from router.balancing.catalog import Catalog, ModelEntry
from router.balancing.member import Member
from router.balancing.pool import Pool
from router.balancing.ring import Ring


@dataclass(frozen=True, slots=True)
class FleetView:
    """What a request sees of the fleet: it never changes, a new one takes its place.

    `ring` is over the workers of the router's own region (all, where it has none), `far` over the others. `pools` has
    those to ask, by name and version of a model.
    """

    ring: Ring
    members: Mapping[str, Member]
    catalog: Catalog
    far: Ring = field(default_factory=lambda: Ring({}))
    pools: Mapping[tuple[str, str], Pool] = field(default_factory=dict)

    def pool(self, model: ModelEntry) -> Pool | None:
        """Whom to ask for `model`; None where nobody can be."""
        return self.pools.get((model.name, model.version))

    def share(self, member: Member) -> float:
        """The part of the key space that the member owns, 0 to 1, among those of its region."""
        return (self.ring if member.address in self.ring.members else self.far).share(member.address)
