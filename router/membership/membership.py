"""Membership of the fleet: the workers that the sources list, retained while sources fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from router.balancing.member import Listing

# A source that drops a worker that still answers has most likely lost its data, and will get it again.
LINGER_SECONDS = 10.0


class Membership:
    """Merges the lists of all sources. The last list of a source stays valid until it reports another.

    A worker that is no longer listed leaves immediately if it does not answer, and after LINGER_SECONDS if it does.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sources: dict[str, Mapping[str, Listing]] = {}
        self._members: dict[str, Listing] = {}
        self._missing_since: dict[str, float] = {}

    def report(self, source: str, listings: Iterable[Listing]) -> None:
        self._sources[source] = {listing.address: listing for listing in listings}

    def members(self, answers: Callable[[str], bool]) -> Mapping[str, Listing]:
        """The current members, by address. `answers` returns whether the worker at an address answers."""
        listed: dict[str, Listing] = {}
        for listings in self._sources.values():
            listed |= listings
        now = self._clock()
        for address, listing in self._members.items():
            if address in listed:
                self._missing_since.pop(address, None)
            elif answers(address) and now - self._missing_since.setdefault(address, now) < LINGER_SECONDS:
                listed[address] = listing
            else:
                self._missing_since.pop(address, None)
        self._members = listed
        return listed
