"""A dict of what was used recently, bounded without a scan and without a moment at which all is forgotten."""

from __future__ import annotations  # compiled by mypyc

from typing import Any, Generic, TypeVar

from services.runtime.telemetry.metrics import Family, Sample

FORGOTTEN = Family(
    "ringmesh_forgotten_total",
    "counter",
    "entries evicted from bounded tables of the process: compute times of models (costs), refusals, "
    "requests by their bytes (requests), their descriptions, keys of tenants, tail latencies, usual times of models",
    ("what",),
)
Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """At most twice `size` entries: the last `size` that were put or got, and perhaps those before them.

    Two generations: what is put or got moves to the younger one, and when that is full the older one is dropped.
    Threads may share it: an entry that two of them move at once may be forgotten, and no other harm is done.
    """

    __slots__ = ("_old", "_size", "_young", "dropped")

    def __init__(self, size: int) -> None:
        self._size = size
        self._young: dict[Key, Value] = {}
        self._old: dict[Key, Value] = {}
        # Entries forgotten for want of room.
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, key: Key) -> Value | None:
        """None where it is not known, or no longer."""
        value = self._young.get(key)
        if value is None:
            value = self._old.get(key)
            if value is not None:
                self.put(key, value)
        return value

    def put(self, key: Key, value: Value) -> None:
        """In place of what is there."""
        self._old.pop(key, None)
        if len(self._young) >= self._size and key not in self._young:
            self.dropped += len(self._old)
            self._old, self._young = self._young, {}
        self._young[key] = value

    def pop(self, key: Key) -> Value | None:
        """Forgets it; None where it is not known."""
        value = self._young.pop(key, None)
        return self._old.pop(key, None) if value is None else value


def forgotten(what: str, recent: Recent[Any, Any]) -> Sample:
    """For `Metrics.add`."""
    return Sample(FORGOTTEN, (what,), recent.dropped)
