"""What purges do to keys: each has an epoch, and an epoch is part of the keys in its scope.

So a purge is one number, whatever it covers: what was filed before is under keys that nobody asks for any more, and
goes as its room is needed. Epochs only grow, and the larger wins where two are merged, so views agree in the end.
"""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Mapping
from types import MappingProxyType

from blake3 import blake3

EVERYTHING = "all"
# Not of any key: raised when models were loaded or unloaded.
MODELS = "models"
_MAX_PREFIXES = 4096


def model_scope(name: str) -> str:
    """All versions of a model; what other services call their data is a scope of this kind too."""
    return f"model:{name}"


def tenant_scope(tenant: str) -> str:
    """What is kept apart for a tenant."""
    return f"tenant:{tenant}"


def key_scope(key: bytes) -> str:
    """One answer, by its key as `ringmesh.router.v1.Explain` tells it."""
    return f"key:{key.hex()}"


class Epochs:
    """An immutable view of all purges: `scopes` to epochs. `version` is the largest of them, 0 before the first."""

    __slots__ = ("_everything", "_keys", "_prefixes", "scopes", "version")

    def __init__(self, scopes: Mapping[str, int]) -> None:
        self._everything = scopes.get(EVERYTHING, 0)
        # What came before a purge of everything adds nothing to it.
        kept = {scope: epoch for scope, epoch in scopes.items() if epoch >= self._everything}
        self.scopes: Mapping[str, int] = MappingProxyType(kept)
        self.version = max(kept.values(), default=0)
        self._keys = {bytes.fromhex(s[4:]): epoch for s, epoch in kept.items() if s.startswith("key:")}
        self._prefixes: dict[bytes, bytes] = {}

    def key(self, model_digest: bytes, model_name: str, request_hash: bytes) -> bytes:
        """32 bytes: the answer of this model version to this request, since the last purge of it."""
        if not self.version:
            return model_digest + request_hash
        if self._keys and (epoch := self._keys.get(model_digest + request_hash)):
            return blake3(model_digest + request_hash + self.prefix(model_digest, model_name) + _bytes(epoch)).digest()
        prefix = self._prefixes.get(model_digest)
        return (self.prefix(model_digest, model_name) if prefix is None else prefix) + request_hash

    def prefix(self, model_digest: bytes, model_name: str) -> bytes:
        """16 bytes in place of the digest; the digest itself where no purge covers the model."""
        prefix = self._prefixes.get(model_digest)
        if prefix is None:
            epochs = _bytes(self._everything) + _bytes(self.scopes.get(model_scope(model_name), 0))
            prefix = blake3(model_digest + epochs).digest(16) if any(epochs) else model_digest
            if len(self._prefixes) >= _MAX_PREFIXES:
                self._prefixes.clear()
            self._prefixes[model_digest] = prefix
        return prefix

    def own_key(self, namespace: str, tenant: str, key: bytes) -> bytes:
        """64 hexadecimal digits (so without braces): what another service filed under `key` since the last purge."""
        epochs = [self._everything, self.scopes.get(model_scope(namespace), 0), self.tenant(tenant)]
        name, owner = namespace.encode(), tenant.encode()
        text = b"".join((_bytes(len(name)), name, _bytes(len(owner)), owner, *map(_bytes, epochs), key))
        return blake3(text, derive_key_context="ringmesh 2026-11 data of other services").hexdigest().encode()

    def tenant(self, tenant: str) -> int:
        """The epoch of a tenant, 0 where it was never purged."""
        return self.scopes.get(tenant_scope(tenant), 0)

    def merged(self, scopes: Mapping[str, int]) -> Epochs:
        """With what another view has."""
        return Epochs({**self.scopes, **{s: max(e, self.scopes.get(s, 0)) for s, e in scopes.items()}})


def _bytes(number: int) -> bytes:
    return number.to_bytes(8, "little")
