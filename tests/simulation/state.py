"""In-memory replacements of a worker's disk state: model files, their snapshots, and decisions about models.

Disks are not simulated, and reading the same small files again would take most of the time of a seed.
"""

import time

from services.inference.models.model_store import ModelStore
from services.inference.repository import repository
from services.inference.repository.repository import ModelFiles
from services.inference.repository.snapshots import Snapshot


class Store(ModelStore):
    """A ModelStore whose files are read once in a process."""

    def _find(self, name, overrides, scratch):
        folder = self._source.fetch(name, None)
        found = _FILES.get((folder, name))
        if found is None:
            (files,) = repository.versions(folder, name, None, private=True)
            hashed = files.hashed()
            found = _Files(**{field: getattr(hashed, field) for field in ModelFiles.__dataclass_fields__})
            _FILES[folder, name] = found
        return [found]


_FILES = {}


class _Files(ModelFiles):
    def hashed(self):
        return self


class Snapshots:
    """Replaces Snapshots, for files that never change."""

    def take(self, files):
        return _Snapshot(files.folder, -1, files)

    def sweep(self):
        """Does nothing: there is nothing to remove."""


class _Snapshot(Snapshot):
    def close(self):
        """Does nothing: all workers share the folder."""


class Decisions:
    """Replaces Decisions; they outlive the processes of a worker."""

    size = 0

    def __init__(self):
        self.fleet = set()
        self.decided_ns = {}
        self._decisions = {}

    def get(self, name):
        return self._decisions.get(name)

    def next_ns(self, name):
        return max(time.time_ns(), self.decided_ns.get(name, 0) + 1)

    def keep(self, name, decision):
        self._decisions[name] = decision
        self.decided_ns[name] = decision.decided_ns
        (self.fleet.add if decision.fleet else self.fleet.discard)(name)

    def close(self):
        """Does nothing."""
