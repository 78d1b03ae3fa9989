"""A bounded dict of recently used entries that needs no scan and never drops all entries together."""

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
    """Holds at most twice `size` entries: the last `size` that were put or got, and possibly earlier ones.

    There are two generations. An entry that is put or got moves to the younger one; when that is full, the older one
    is dropped. Threads may share it: the only effect of a race is that an entry moved by two threads may be lost.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._young: dict[Key, Value] = {}
        self._old: dict[Key, Value] = {}
        # Number of entries evicted.
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, key: Key) -> Value | None:
        value = self._young.get(key)
        if value is None:
            value = self._old.get(key)
            if value is not None:
                self.put(key, value)
        return value

    def put(self, key: Key, value: Value) -> None:
        self._old.pop(key, None)
        if len(self._young) >= self._size and key not in self._young:
            self.dropped += len(self._old)
            self._old, self._young = self._young, {}
        self._young[key] = value

    def pop(self, key: Key) -> Value | None:
        value = self._young.pop(key, None)
        return self._old.pop(key, None) if value is None else value


def forgotten(what: str, recent: Recent[Any, Any]) -> Sample:
    """The number of entries evicted from `recent`, for `Metrics.add`."""
    return Sample(FORGOTTEN, (what,), recent.dropped)
