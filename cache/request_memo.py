"""What a request means, by its bytes: who sends the same bytes again is spared parsing and describing them."""

from __future__ import annotations

import os
from typing import Generic, TypeVar

from blake3 import blake3

Meaning = TypeVar("Meaning")

# Above, hashing is most of what a request costs, and it would be done twice.
LARGEST_BYTES = 32 << 10


class RequestMemo(Generic[Meaning]):
    """The meanings of the last `size` requests, or up to twice as many.

    Two generations: what is asked for moves to the younger one, and the older is dropped when that is full.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        # Keyed, so that nobody can search for two requests that look the same here.
        self._key = os.urandom(32)
        self._young: dict[bytes, Meaning] = {}
        self._old: dict[bytes, Meaning] = {}

    def digest(self, data: bytes, tenant: str) -> bytes:
        """Where these bytes of this tenant are filed."""
        digest = blake3(data, key=self._key).digest(16)
        return digest + tenant.encode() if tenant else digest

    def get(self, digest: bytes) -> Meaning | None:
        """None where it is not known, or no longer."""
        meaning = self._young.get(digest)
        if meaning is None:
            meaning = self._old.get(digest)
            if meaning is not None:
                self.put(digest, meaning)
        return meaning

    def put(self, digest: bytes, meaning: Meaning) -> None:
        """In place of what is there."""
        if len(self._young) >= self._size:
            self._old, self._young = self._young, {}
        self._young[digest] = meaning
