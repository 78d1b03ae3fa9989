"""Looks up answers in the local tier, and applies the caller's cache-control and the model's freshness."""

from __future__ import annotations  # compiled by mypyc

import time
from collections.abc import Callable

from cache.mesh import Compute, Mesh
from cache.policy.cache_control import CacheControl
from cache.policy.freshness import Freshness
from cache.tiers.entry import Entry
from router.balancing.catalog import ModelEntry
from router.request.call import Call


class LocalAnswers:
    """Looks up calls in the local tier of `mesh`. `renewal` returns a function that recomputes the answer to a call."""

    def __init__(self, mesh: Mesh, renewal: Callable[[Call], Compute]) -> None:
        self._mesh = mesh
        self._renewal = renewal

    def get(self, call: Call) -> Entry | None:
        """A usable answer from the local tier, or None."""
        model = call.model
        if not call.request_hash or model is None:
            return None
        control = call.control
        if control is not None and control.no_cache:
            return None
        purges = self._mesh.purges
        key = purges.epochs.key(model.digest, model.name, call.request_hash)
        entry = self._mesh.local.get(key)
        if entry is not None:
            if entry.created_at_ms < purges.oldest_ms:
                entry = None
            elif control is not None:
                entry = entry if takes(control, model, entry) else None
            elif model.freshness is not None and not self._is_usable(call, model.freshness, key, entry):
                entry = None
        if entry is None:
            call.trace.span("cache.local", call.start, time.time_ns(), {"ringmesh.cache.hit": False})
        return entry

    def get_again(self, call: Call, freshness: Freshness | None) -> Entry | None:
        """Looks again: an equal request may have ended since `get`. Counts neither a hit nor a miss.

        Raises the cached error if the answer is known to be an error.
        """
        entry = self._mesh.peek(call.key)
        if entry is None or freshness is None or self._is_usable(call, freshness, call.key, entry):
            return entry
        return None

    def _is_usable(self, call: Call, freshness: Freshness, key: bytes, entry: Entry) -> bool:
        """Whether the entry is not too old. If it expires soon, schedules its renewal for after the answer."""
        now_ms = time.time_ns() // 1_000_000
        if freshness.is_young(entry.created_at_ms, now_ms):
            return True
        if freshness.is_over(entry.created_at_ms, now_ms):
            return False
        subject = call.subject()
        if self._mesh.is_due(subject, entry, freshness, now_ms):
            compute = self._renewal(call)
            call.renew = lambda: self._mesh.renew(key, entry, compute, subject)
        return True


def takes(control: CacheControl | None, model: ModelEntry, entry: Entry) -> bool:
    """Whether the entry is fresh and satisfies `control`."""
    now_ms = time.time_ns() // 1_000_000
    if model.freshness is not None and model.freshness.is_stale(entry.created_at_ms, now_ms):
        return False
    return control is None or control.takes(entry.created_at_ms, now_ms)
