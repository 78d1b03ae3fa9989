"""Caches parsed requests by their bytes, so that identical bytes are parsed and described only once."""

from __future__ import annotations  # compiled by mypyc

import os
from typing import Generic, TypeVar

from blake3 import blake3

from services.runtime.telemetry.recent import Recent

Meaning = TypeVar("Meaning")

# Above this size, hashing dominates the cost of a request, and the memo would hash it a second time.
LARGEST_BYTES = 32 << 10


class RequestMemo(Generic[Meaning]):
    """Keeps the parsed form of at least the last `size` requests, and of at most twice as many."""

    def __init__(self, size: int) -> None:
        # The hash is keyed, so that nobody can search for two requests with the same digest.
        self._key = os.urandom(32)
        self.meanings: Recent[bytes, Meaning] = Recent(size)

    def digest(self, data: bytes, tenant: str) -> bytes:
        """Returns the memo key of these bytes for this tenant."""
        digest = blake3(data, key=self._key).digest(16)
        return digest + tenant.encode() if tenant else digest

    def get(self, digest: bytes) -> Meaning | None:
        """Returns the parsed request, or None if it is unknown or was evicted."""
        return self.meanings.get(digest)

    def put(self, digest: bytes, meaning: Meaning) -> None:
        """Stores the parsed request and replaces an existing one."""
        self.meanings.put(digest, meaning)
