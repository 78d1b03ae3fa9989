"""Epochs of purges: each purge sets the epoch of its scope, and the epoch is part of every cache key in that scope.

A purge therefore writes one number, whatever it covers. Older entries stay under keys that are no longer requested,
until they are evicted. Epochs only grow, and a merge keeps the larger one, so all processes converge.
"""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Mapping
from types import MappingProxyType

from blake3 import blake3

EVERYTHING = "all"
# Part of no key: raised when models are loaded or unloaded.
MODELS = "models"
_MAX_PREFIXES = 4096
LARGEST_EPOCH = 2**63 - 1
_KEY = "key:"


def model_scope(name: str) -> str:
    """The scope of all versions of a model, or of a namespace of another service."""
    return f"model:{name}"


def tenant_scope(tenant: str) -> str:
    return f"tenant:{tenant}"


def key_scope(key: bytes) -> str:
    """The scope of one answer, by its key from `ringmesh.router.v1.Explain`."""
    return f"{_KEY}{key.hex()}"


class Epochs:
    """An immutable snapshot of all purges. `scopes` maps scopes to epochs; `version` is the largest epoch or 0."""

    def __init__(self, scopes: Mapping[str, int]) -> None:
        self._everything = scopes.get(EVERYTHING, 0)
        # A purge of everything includes all earlier purges.
        kept = {scope: epoch for scope, epoch in scopes.items() if epoch >= self._everything}
        self.scopes: Mapping[str, int] = MappingProxyType(kept)
        self.version = max(kept.values(), default=0)
        self._keys = {bytes.fromhex(s[len(_KEY) :]): epoch for s, epoch in kept.items() if s.startswith(_KEY)}
        self._prefixes: dict[bytes, bytes] = {}

    def key(self, model_digest: bytes, model_name: str, request_hash: bytes) -> bytes:
        """Returns the 32-byte cache key of this model version's answer to this request, since its last purge."""
        if not self.version:
            return model_digest + request_hash
        if self._keys and (epoch := self._keys.get(model_digest + request_hash)):
            return blake3(model_digest + request_hash + self.prefix(model_digest, model_name) + _bytes(epoch)).digest()
        prefix = self._prefixes.get(model_digest)
        return (self.prefix(model_digest, model_name) if prefix is None else prefix) + request_hash

    def prefix(self, model_digest: bytes, model_name: str) -> bytes:
        """Returns the 16 bytes that replace the digest; the digest itself if no purge covers the model."""
        prefix = self._prefixes.get(model_digest)
        if prefix is None:
            epochs = _bytes(self._everything) + _bytes(self.scopes.get(model_scope(model_name), 0))
            prefix = blake3(model_digest + epochs).digest(16) if any(epochs) else model_digest
            if len(self._prefixes) >= _MAX_PREFIXES:
                self._prefixes.clear()
            self._prefixes[model_digest] = prefix
        return prefix

    def own_key(self, namespace: str, tenant: str, key: bytes) -> bytes:
        """Returns the cache key of another service's item since its last purge: 64 hexadecimal digits, no braces."""
        epochs = [self._everything, self.scopes.get(model_scope(namespace), 0), self.tenant(tenant)]
        name, owner = namespace.encode(), tenant.encode()
        text = b"".join((_bytes(len(name)), name, _bytes(len(owner)), owner, *map(_bytes, epochs), key))
        return blake3(text, derive_key_context="ringmesh 2026-11 data of other services").hexdigest().encode()

    def tenant(self, tenant: str) -> int:
        return self.scopes.get(tenant_scope(tenant), 0)

    def merged(self, scopes: Mapping[str, int]) -> Epochs:
        """Returns a snapshot that also has the epochs of `scopes`; the larger epoch wins.

        Ignores what no purge writes: whoever has access to Redis could make all requests fail with it.
        """
        valid = {scope: epoch for scope, epoch in scopes.items() if _is_valid(scope, epoch)}
        return Epochs({**self.scopes, **{s: max(e, self.scopes.get(s, 0)) for s, e in valid.items()}})


def _is_valid(scope: str, epoch: int) -> bool:
    if scope.startswith(_KEY):
        try:
            bytes.fromhex(scope[len(_KEY) :])
        except ValueError:
            return False
    return 0 < epoch <= LARGEST_EPOCH


def _bytes(number: int) -> bytes:
    return number.to_bytes(8, "little")
