"""Who owns a key: a table of slots, each with its members ranked by weighted rendezvous score.

Rendezvous hashing (Thaler, Ravishankar 1998; weighted form by Schindelhauer, Schomaker 2005) moves no key
that does not have to, but costs a pass over the members. So it runs once for each of 65,536 slots when the
membership changes, and a look-up is one index into an immutable table. The rank is at once the owner, the
order of retries, and the order of overflow.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from blake3 import blake3

SLOTS = 1 << 16
# As many attempts as a request can make; the rest of the order would never be read.
RANKS = 8


class Ring:
    """An immutable ring over `members`, weights by name. Every router with the same members has the same ring."""

    def __init__(self, members: Mapping[str, float]) -> None:
        if any(weight <= 0 for weight in members.values()):
            raise ValueError("a member's weight is above 0; leave out who shall own nothing")
        self._members = tuple(sorted(members))
        weights = np.array([members[name] for name in self._members])
        self._table = _rank(self._members, weights) if self._members else None

    @property
    def members(self) -> tuple[str, ...]:
        """Names in the order of the alphabet."""
        return self._members

    def ranked(self, request_hash: bytes) -> tuple[str, ...]:
        """The owner of a hash and those that follow it, at most RANKS; () on an empty ring."""
        if self._table is None:
            return ()
        members = self._members
        row = self._table[request_hash[0] << 8 | request_hash[1]]
        return tuple([members[index] for index in row.tolist()])

    def share(self, member: str) -> float:
        """The part of the key space that `member` owns, 0 to 1."""
        if self._table is None:
            return 0.0
        return float(np.mean(self._table[:, 0] == self._members.index(member)))


def _rank(names: tuple[str, ...], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Member indices by slot [SLOTS, min(len(names), RANKS)], highest score first."""
    seeds = np.frombuffer(b"".join(blake3(name.encode()).digest(8) for name in names), dtype="<u8")
    hashes = _mix(_mix(np.arange(SLOTS, dtype=np.uint64))[:, None] ^ seeds[None, :])
    # (0, 1), never 0 or 1: 53 bits and a half
    uniform = ((hashes >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    scores = weights / -np.log(uniform)
    return np.argsort(-scores, axis=1, kind="stable")[:, :RANKS].astype(np.uint16)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
