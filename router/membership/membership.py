"""Who belongs to the fleet: what the sources list, held on to while sources fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from router.balancing.member import Listing

# A source that forgets a worker that still answers has lost its memory, most likely, and will be told again.
LINGER_SECONDS = 10.0


class Membership:
    """Merges the sources. A source that is silent has not changed its mind.

    Whoever is no longer listed leaves at once where it does not answer, and after LINGER_SECONDS where it does.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sources: dict[str, Mapping[str, Listing]] = {}
        self._members: dict[str, Listing] = {}
        self._missing_since: dict[str, float] = {}

    def told(self, source: str, listings: Iterable[Listing]) -> None:
        """All that a source lists now."""
        self._sources[source] = {listing.address: listing for listing in listings}

    def members(self, answers: Callable[[str], bool]) -> Mapping[str, Listing]:
        """By address, as of now. `answers` says whether the worker at an address does."""
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
