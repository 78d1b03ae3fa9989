"""The snapshot of the fleet that a request uses."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Mapping
from dataclasses import dataclass, field

from router.balancing.catalog import Catalog, ModelEntry
from router.balancing.member import Member
from router.balancing.pool import Pool
from router.balancing.ring import Ring


@dataclass(frozen=True, slots=True)
class FleetView:
    """An immutable snapshot of the fleet; a new one replaces it.

    `ring` is over the workers of the router's own region (all if it has none), `far` over the others. `pools` has the
    pool of each model, by name and version.
    """

    ring: Ring
    members: Mapping[str, Member]
    catalog: Catalog
    far: Ring = field(default_factory=lambda: Ring({}))
    pools: Mapping[tuple[str, str], Pool] = field(default_factory=dict)

    def pool(self, model: ModelEntry) -> Pool | None:
        """The pool for `model`; None if no worker can run it now."""
        return self.pools.get((model.name, model.version))

    def share(self, member: Member) -> float:
        """The share of the key space that the member owns, 0 to 1, among the members of its ring."""
        return (self.ring if member.address in self.ring.members else self.far).share(member.address)
