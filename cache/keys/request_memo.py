"""What a request means, by its bytes: who sends the same bytes again is spared parsing and describing them."""

from __future__ import annotations  # compiled by mypyc

import os
from typing import Generic, TypeVar

from blake3 import blake3

from services.runtime.telemetry.recent import Recent

Meaning = TypeVar("Meaning")

# Above, hashing is most of what a request costs, and it would be done twice.
LARGEST_BYTES = 32 << 10


class RequestMemo(Generic[Meaning]):
    """The meanings of the last `size` requests, or up to twice as many."""

    def __init__(self, size: int) -> None:
        # Keyed, so that nobody can search for two requests that look the same here.
        self._key = os.urandom(32)
        self.meanings: Recent[bytes, Meaning] = Recent(size)

    def digest(self, data: bytes, tenant: str) -> bytes:
        """Where these bytes of this tenant are filed."""
        digest = blake3(data, key=self._key).digest(16)
        return digest + tenant.encode() if tenant else digest

    def get(self, digest: bytes) -> Meaning | None:
        """None where it is not known, or no longer."""
        return self.meanings.get(digest)

    def put(self, digest: bytes, meaning: Meaning) -> None:
        """In place of what is there."""
        self.meanings.put(digest, meaning)
