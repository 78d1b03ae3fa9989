"""The ring: a table of slots, each with its members ranked by weighted rendezvous score.

Rendezvous hashing (Thaler, Ravishankar 1998; weighted form by Schindelhauer, Schomaker 2005) moves the minimum number
of keys, but costs a pass over the members. So it runs once for each of 65,536 slots when the membership changes, and a
look-up is one index into an immutable table. The ranking gives the owner, the order of retries and the order of
overflow.
"""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from blake3 import blake3

SLOTS = 1 << 16
# Ranks in the table. Almost every request ends within these; `order` ranks all members.
RANKS = 8
# Slots ranked at a time: temporary tables stay in the CPU cache and below 1 MB at 300 members.
_CHUNK = 256


class Ring:
    """An immutable ring over `members` (weights by name). Every router with the same members has the same ring.

    Making one takes up to half a second at 300 members (docs/decisions/0005), most of it outside the GIL.
    """

    def __init__(self, members: Mapping[str, float]) -> None:
        if any(weight <= 0 for weight in members.values()):
            raise ValueError("weights must be above 0; leave out members that own nothing")
        # In alphabetical order.
        self.members = tuple(sorted(members))
        self._weights = np.array([members[name] for name in self.members])
        self._seeds = _seeds(self.members)
        self._table = _rank(self._seeds, self._weights) if self.members else None
        owners = np.zeros(0, np.uint16) if self._table is None else self._table[:, 0]
        self._shares = np.bincount(owners, minlength=len(members)) / SLOTS

    def ranked(self, request_hash: bytes) -> tuple[str, ...]:
        """The owner of a hash and the next in rank, at most RANKS; () if the ring is empty. Takes a microsecond."""
        if self._table is None:
            return ()
        members = self.members
        row = self._table[request_hash[0] << 8 | request_hash[1]]
        return tuple([members[index] for index in row.tolist()])

    def order(self, request_hash: bytes) -> tuple[str, ...]:
        """All members by rank, as `ranked` begins; () if the ring is empty. Computes the ranks: takes 20 to 60 µs."""
        slot = _mix(np.array([request_hash[0] << 8 | request_hash[1]], np.uint64))
        costs = _costs(slot, self._seeds, self._weights)
        return tuple([self.members[index] for index in np.argsort(costs, kind="stable").tolist()])

    def share(self, member: str) -> float:
        """The share of the key space that `member` owns, 0 to 1."""
        return float(self._shares[self.members.index(member)])


def _rank(seeds: npt.NDArray[np.uint64], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Member indices by slot [SLOTS, min(len(seeds), RANKS)], best first."""
    ranks = min(len(seeds), RANKS)
    table = np.empty((SLOTS, ranks), np.uint16)
    slots = _mix(np.arange(SLOTS, dtype=np.uint64))
    for start in range(0, SLOTS, _CHUNK):
        costs = _costs(slots[start : start + _CHUNK, None], seeds, weights)
        # Cheaper than sorting all members of every slot for the first few.
        best = np.argpartition(costs, ranks - 1, axis=1)[:, :ranks]
        order = np.argsort(np.take_along_axis(costs, best, 1), axis=1, kind="stable")
        table[start : start + _CHUNK] = np.take_along_axis(best, order, 1)
    return table


def _seeds(names: tuple[str, ...]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(blake3(name.encode()).digest(8) for name in names), dtype="<u8")


def _costs(
    slots: npt.NDArray[np.uint64], seeds: npt.NDArray[np.uint64], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """-log(u) / weight, the inverse of the rendezvous score: the member with the lowest cost owns the slot."""
    hashes = _mix(slots ^ seeds)
    # (0, 1), never 0 or 1: 53 bits and a half
    uniform = ((hashes >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    costs: npt.NDArray[np.float64] = np.log(uniform) / -weights
    return costs


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
