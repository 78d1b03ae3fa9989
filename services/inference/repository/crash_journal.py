"""Records the models that are running when this worker crashes, to quarantine a model that crashes it repeatedly.

A running model has a mark in a mapped file, which outlives the process however it ends. At the next start the marks
show the possible causes. If several models were running, all are suspects. Suspects run one at a time, so the next
crash has a single culprit.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from services.runtime.verdict import YES, Verdict

log = logging.getLogger(__name__)

# A model is quarantined after CRASHES crashes with at most WINDOW_SECONDS between consecutive ones.
CRASHES = 3
WINDOW_SECONDS = 600.0

_RECORDS = 1024
# Digest of the files, running (the mark), suspect, crashes, CRC of all but the mark, time of the last crash. A record
# without a digest is free.
_RECORD = struct.Struct("<16sBBHId")
_AT_WORK = 16


@dataclass(frozen=True, slots=True)
class _Crashes:
    digest: bytes
    at_work: int = 0
    suspect: int = 0
    crashes: int = 0
    last: float = 0.0


class Watch:
    """Marks a model as running, from any thread: `with watch: run()`. Suspects should run under `turn`."""

    def __init__(
        self,
        journal: mmap.mmap | None = None,
        at: int = 0,
        suspect_until: float = 0.0,
        clock: Callable[[], float] = time.time,
        turn: asyncio.Lock | None = None,
    ) -> None:
        self.turn = turn or asyncio.Lock()
        self._clock = clock
        self._journal = journal
        self._at = at
        self._suspect_until = suspect_until
        self._at_work = 0
        self._lock = threading.Lock()

    @property
    def suspect(self) -> bool:
        return self._suspect_until > 0 and self._clock() < self._suspect_until

    def __enter__(self) -> None:
        self._mark(1)

    def __exit__(self, *_: object) -> None:
        self._mark(-1)

    def _mark(self, more: int) -> None:
        if self._journal is None:
            return
        with self._lock:
            self._at_work += more
            self._journal[self._at] = min(self._at_work, 255)


UNWATCHED = Watch()


class CrashJournal:
    """The journal of one worker at `path`. A digest covers a model's files, so changed files count as another model."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Raises OSError if the file cannot be created, or another worker uses it."""
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._turn = asyncio.Lock()
        self._watches: dict[bytes, Watch] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file.truncate(_RECORDS * _RECORD.size)
        # Allocates all blocks: a write to a mapped page without disk space would kill the process.
        os.posix_fallocate(self._file.fileno(), 0, _RECORDS * _RECORD.size)
        self._map = mmap.mmap(self._file.fileno(), _RECORDS * _RECORD.size)
        self._blame()

    def watch(self, digest: bytes) -> Watch:
        """The watch of a model that is about to be loaded. It stays the same while this worker lives."""
        with self._lock:
            if digest not in self._watches:
                self._watches[digest] = self._new_watch(digest)
            return self._watches[digest]

    def _new_watch(self, digest: bytes) -> Watch:
        free = None
        for slot, record in self._records():
            if record.digest == digest:
                return self._watch_of(slot, record.last + WINDOW_SECONDS if record.suspect else 0.0)
            if free is None and not record.suspect and record.digest not in self._watches:
                free = slot
        if free is None:
            return UNWATCHED
        self._write(free, _Crashes(digest))
        return self._watch_of(free, 0.0)

    def _watch_of(self, slot: int, suspect_until: float) -> Watch:
        return Watch(self._map, slot * _RECORD.size + _AT_WORK, suspect_until, self._clock, self._turn)

    def allows(self, digest: bytes) -> Verdict:
        """Whether the model may be loaded: not while it is in quarantine."""
        for _, record in self._records():
            if record.digest == digest and record.crashes >= CRASHES:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.last))
                return Verdict(
                    f"quarantined: this worker died {record.crashes} times while it was loaded or run, last at {when} "
                    "UTC; other files or RepositoryModelLoad give it another chance"
                )
        return YES

    def pardon(self, digest: bytes) -> None:
        with self._lock:
            for slot, record in self._records():
                if record.digest == digest and record.crashes:
                    self._write(slot, _Crashes(digest))

    def close(self) -> None:
        """Closes the journal when no model runs. The file stays if it has suspects."""
        if not any(record.suspect for _, record in self._records()):
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _blame(self) -> None:
        """Evaluates the marks that the previous process left. A culprit is also a suspect, so it runs alone."""
        now = self._clock()
        if damaged := [slot for slot in range(_RECORDS) if not self._is_whole(slot)]:
            log.warning("%d records of the crash journal %s are damaged, and forgotten", len(damaged), self._path)
            for slot in damaged:
                self._write(slot, _Crashes(bytes(16)))
        for slot, record in self._records():
            if record.crashes < CRASHES and record.last < now - WINDOW_SECONDS:
                self._write(slot, replace(record, suspect=0, crashes=0, last=0.0))
        at_work = {slot: record for slot, record in self._records() if record.at_work}
        suspects = {slot: record for slot, record in at_work.items() if record.suspect}
        culprits = at_work if len(at_work) == 1 else suspects
        for slot, record in at_work.items():
            left = replace(record, at_work=0)
            if len(culprits) != 1:
                left = replace(left, suspect=1, last=now)
            elif slot in culprits:
                left = replace(left, suspect=1, last=now, crashes=min(record.crashes + 1, 255))
            self._write(slot, left)
        if at_work:
            log.warning("the last run of this worker ended with %d models at work", len(at_work))
        if any(self._read(slot).crashes >= CRASHES for slot in at_work):
            for slot, record in self._records():
                if not record.crashes:  # it ran beside the culprit
                    self._write(slot, replace(record, suspect=0, last=0.0))

    def _records(self) -> Iterator[tuple[int, _Crashes]]:
        return ((slot, self._read(slot)) for slot in range(_RECORDS))

    def _read(self, slot: int) -> _Crashes:
        digest, at_work, suspect, crashes, _, last = _RECORD.unpack_from(self._map, slot * _RECORD.size)
        return _Crashes(digest, at_work, suspect, crashes, last)

    def _is_whole(self, slot: int) -> bool:
        data = self._map[slot * _RECORD.size : (slot + 1) * _RECORD.size]
        digest, _, suspect, crashes, check, last = _RECORD.unpack(data)
        return not any(data) or bool(check == _check(digest, suspect, crashes, last))

    def _write(self, slot: int, record: _Crashes) -> None:
        check = _check(record.digest, record.suspect, record.crashes, record.last)
        fields = (record.digest, record.at_work, record.suspect, record.crashes, check, record.last)
        _RECORD.pack_into(self._map, slot * _RECORD.size, *fields)


def _check(digest: bytes, suspect: int, crashes: int, last: float) -> int:
    return zlib.crc32(struct.pack("<16sBHd", digest, suspect, crashes, last))
