"""Batches of usage records on disk, from before they are sent until the ledger has them.

A file a batch: `<epoch>-<sequence>-<records>-<requests>.batch`, 16 bytes of digest and a serialized Batch, written
aside and renamed, so that a file of that name is whole. The name counts what is in it, should its bytes be damaged.
What is here survives the end of this process, though not that of the host.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from router.accounting.usage_batch import NOTHING, encode

log = logging.getLogger(__name__)

_DIGEST_BYTES = 16
_BLOCK_BYTES = 4096
_SUFFIX = ".batch"
# Of an epoch (nanoseconds, which have 19 digits), a sequence or a count.
_MOST_DIGITS = 19
_LARGEST = 1 << 62
_LONGEST_TEXT = 256


class SpoolError(Exception):
    """The folder cannot be used: another process does, or it cannot be written to."""


@dataclass(frozen=True, order=True, slots=True)
class Spooled:
    """A batch by its number. `size` is what its file takes on disk."""

    epoch: int
    sequence: int
    records: int
    requests: int
    size: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.epoch}-{self.sequence}-{self.records}-{self.requests}{_SUFFIX}"


class LedgerSpool:
    """The batches in `folder`, of at most `max_bytes` and one more: beyond, the oldest are given up and counted, and
    where that frees nothing, the newest.

    `clock_ns` as time.time_ns. Not safe for use by several threads at a time.
    """

    def __init__(self, folder: Path, max_bytes: int, clock_ns: Callable[[], int]) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._clock_ns = clock_ns
        self._lock: BinaryIO | None = None
        self._waiting: list[Spooled] = []
        self._epoch = 0
        self._next = 1
        # The id under which batches are sent: made with the folder, "" until `open`.
        self.router_id = ""
        # The ledger's last answer about leases, also from before a restart; serialized.
        self.leases = b""
        # Lost before they had a number; the next batch that can be written says so.
        self._unnumbered = (0, 0)
        self.bytes = 0
        self.dropped_requests = 0

    @property
    def epoch(self) -> int:
        """The start epoch of the next batches."""
        return self._epoch

    def __len__(self) -> int:
        return len(self._waiting)

    def open(self) -> None:
        """Locks the folder, begins an epoch, and finds what earlier ones left. Raises SpoolError."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = (self._folder / "lock").open("ab")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.router_id = self._read_id()
            leases = self._folder / "leases"
            self.leases = leases.read_bytes() if leases.exists() else b""
            self._begin_epoch()
            self._waiting = []
            for one in sorted(self._find()):
                # Where giving one up was interrupted there are two, and the one that counts comes first.
                if self._waiting and (one.epoch, one.sequence) == (self._waiting[-1].epoch, self._waiting[-1].sequence):
                    (self._folder / one.name).unlink()
                else:
                    self._waiting.append(one)
        except BlockingIOError:
            raise SpoolError(f"another process uses {self._folder}") from None
        except OSError as error:
            raise SpoolError(f"cannot keep usage in {self._folder}: {error.strerror}") from None
        self.bytes = sum(one.size for one in self._waiting)
        self._lock = lock

    def close(self) -> None:
        """Leaves the rest to the next epoch."""
        if self._lock is not None:
            self._lock.close()

    def append(self, batch: bytes, records: int, requests: int) -> None:
        """Gives the batch its number. What cannot be written counts as dropped; the next batch tells the ledger.

        Opens the folder if that failed before.
        """
        try:
            if self._lock is None:
                self.open()
            if self.bytes > self._max_bytes:
                self._give_up_oldest()
            if self.bytes > self._max_bytes:
                raise SpoolError("it is full")
            if any(self._unnumbered):
                self._write(encode(NOTHING, (), *self._unnumbered), 0, 0)
                self._unnumbered = (0, 0)
            self._write(batch, records, requests)
        except (OSError, SpoolError) as error:
            log.error("usage of %d requests is lost: cannot write to %s: %s", requests, self._folder, error)
            self.dropped_requests += requests
            self._unnumbered = (self._unnumbered[0] + records, self._unnumbered[1] + requests)

    def save_leases(self, leases: bytes) -> None:
        """Keeps `leases` for the next start, which may come while the ledger is down. Raises OSError."""
        if leases != self.leases:
            self._replace("leases", leases)
            self.leases = leases

    def first(self) -> Spooled | None:
        """The one to send next."""
        return self._waiting[0] if self._waiting else None

    def read(self, one: Spooled) -> tuple[bytes, bytes]:
        """The batch and its digest; if it is damaged or gone, an empty batch that counts what was in it.

        Raises OSError where it cannot be read now, as with too many open files.
        """
        try:
            data = (self._folder / one.name).read_bytes()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EIO):
                raise
            data = b""
        digest, batch = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if _digest(batch) == digest:
            return batch, digest
        log.error("batch %s is damaged: usage of %d requests is lost", one.name, one.requests)
        return self.give_up(one)

    def give_up(self, one: Spooled, keep_as: str = "") -> tuple[bytes, bytes]:
        """Puts a batch in its place, under its number, that counts what was in it. `keep_as` renames what was there."""
        batch = encode(NOTHING, (), one.records, one.requests)
        path = self._folder / one.name
        empty = Spooled(one.epoch, one.sequence, 0, 0, _on_disk(_DIGEST_BYTES + len(batch)))
        if keep_as and path.exists():
            path.rename(self._folder / f"{one.name}.{keep_as}")
        self._replace(empty.name, _digest(batch) + batch)
        if path.name != empty.name:
            path.unlink(missing_ok=True)
        self.dropped_requests += one.requests
        self._waiting[self._waiting.index(one)] = empty
        self.bytes += empty.size - one.size
        return batch, _digest(batch)

    def written(self, one: Spooled) -> None:
        """The ledger has it."""
        # It is the first: after a long outage, there are many.
        for place, other in enumerate(self._waiting):
            if (other.epoch, other.sequence) == (one.epoch, one.sequence):
                (self._folder / other.name).unlink(missing_ok=True)
                self.bytes -= other.size
                del self._waiting[place]
                return

    def begin_again(self, *, is_shared: bool = False) -> None:
        """Gives all that waits new numbers in a new epoch: the ledger does not follow its own.

        `is_shared`: another router has this one's id, as where the machine was cloned, and used them: it gets a new id.
        """
        if is_shared:
            self.router_id = self._new_id()
        self._begin_epoch()
        # In place: others look at what waits meanwhile.
        for place, one in enumerate(self._waiting):
            new = Spooled(self._epoch, self._next, one.records, one.requests, one.size)
            self._next += 1
            (self._folder / one.name).rename(self._folder / new.name)
            self._waiting[place] = new

    def _give_up_oldest(self) -> None:
        """The first of an epoch may have been sent: it keeps its bytes."""
        index = 1
        while self.bytes > self._max_bytes and index < len(self._waiting):
            one = self._waiting[index]
            if one.size > _BLOCK_BYTES and self._waiting[index - 1].epoch == one.epoch:
                self.give_up(one)
            index += 1

    def _write(self, batch: bytes, records: int, requests: int) -> None:
        one = Spooled(self._epoch, self._next, records, requests, _on_disk(_DIGEST_BYTES + len(batch)))
        self._replace(one.name, _digest(batch) + batch)
        self._next += 1
        self._waiting.append(one)
        self.bytes += one.size

    def _replace(self, name: str, data: bytes) -> None:
        """Writes a file that is whole even if the process is killed meanwhile."""
        aside = self._folder / "unfinished"
        aside.write_bytes(data)
        aside.rename(self._folder / name)

    def _read_id(self) -> str:
        file = self._folder / "router-id"
        return (file.exists() and _text(file)) or self._new_id()

    def _new_id(self) -> str:
        made = uuid.uuid4().hex
        self._replace("router-id", f"{made}\n".encode())
        return made

    def _begin_epoch(self) -> None:
        """Later than any before, though the clock was set back."""
        file = self._folder / "epoch"
        last = int(text) if file.exists() and _is_number(text := _text(file)) else 0
        known = max((one.epoch for one in self._find()), default=0)
        self._epoch = max(self._clock_ns(), last + 1, known + 1)
        self._next = 1
        self._replace(file.name, f"{self._epoch}\n".encode())

    def _find(self) -> list[Spooled]:
        found = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            parts = path.name.removesuffix(_SUFFIX).split("-")
            if len(parts) == 4 and all(map(_is_number, parts)):
                epoch, sequence, records, requests = map(int, parts)
                found.append(Spooled(epoch, sequence, records, requests, _on_disk(path.stat().st_size)))
        return found


def _on_disk(size: int) -> int:
    """Bytes that a file of `size` takes: whole blocks."""
    return max(-(-size // _BLOCK_BYTES), 1) * _BLOCK_BYTES


def _text(file: Path) -> str:
    """A short text; "" if it is damaged."""
    text = file.read_bytes()[:_LONGEST_TEXT].decode(errors="replace").strip()
    return text if text.isascii() and text.isprintable() else ""


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS and int(text) < _LARGEST


def _digest(batch: bytes) -> bytes:
    return blake3(batch).digest(_DIGEST_BYTES)
