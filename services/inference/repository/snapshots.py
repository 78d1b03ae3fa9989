"""Private copies of model versions. ONNX Runtime maps the copies, while the files in the repository may change.

    <folder>/<content>/files/version, warmup, initial_state    a snapshot, named by its content hash
    <folder>/<content>/partial                                 a snapshot that is being made
    <folder>/request-<random>                                  files of a load request, until a snapshot has them

Workers of one host may share the folder. A process that uses an entry holds a shared lock on it (flock), which the
kernel releases when the process ends. Any worker may remove an entry that is not locked.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from services.inference.repository.repository import (
    VERSION,
    ModelFiles,
    RepositoryError,
    RepositoryUnavailableError,
    opened_path,
)

log = logging.getLogger(__name__)

_FICLONE = 0x40049409  # linux/fs.h: the copy shares blocks until one of the two is written
_COPY_BYTES = 4 << 20
# How often a worker checks whether another has finished the snapshot that both need.
_COPIED_ELSEWHERE_SECONDS = 0.02


class LockedFolder:
    """A folder that is not removed before `close`."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock = lock

    def close(self) -> None:
        """Releases the folder, and removes it if it is unused. May block for long."""
        self._unlock()
        with suppress(OSError):
            _remove_unused(self.folder)

    def __del__(self) -> None:
        self._unlock()

    def _unlock(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


class Snapshot(LockedFolder):
    """A snapshot of a model version. `files`: the files in the snapshot."""

    def __init__(self, folder: Path, lock: int, files: ModelFiles) -> None:
        super().__init__(folder, lock)
        self.files = files


class Snapshots:
    """The snapshots in a folder. Methods read and write files, so they may block for long."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder.resolve()

    def take(self, files: ModelFiles) -> Snapshot:
        """A snapshot with exactly `files.content`. An existing one is used if there is one.

        Raises RepositoryError if the files have changed, and RepositoryUnavailableError if they cannot be copied.
        """
        entry = self._folder / files.content.hex()
        try:
            # Twice: an existing snapshot may be damaged, for example by a power failure.
            for _ in range(2):
                lock = self._use(entry, files)
                snapshot = Snapshot(entry, lock, replace(files, folder=entry / "files" / VERSION))
                if snapshot.files.hashed().content == files.content:
                    return snapshot
                snapshot.close()
        except OSError as error:
            with suppress(OSError):
                _remove_unused(entry)
            raise RepositoryUnavailableError(
                f"cannot copy {files.origin} to {self._folder}, from where it is loaded: {error.strerror}"
            ) from None
        raise RepositoryError(f"cannot load {files.origin}: its files changed meanwhile; load it again")

    def sweep(self) -> None:
        for entry in self._folder.iterdir():
            try:
                _remove_unused(entry)
            except OSError as error:
                log.warning("cannot remove %s: %s", entry, error.strerror)

    def scratch(self) -> LockedFolder:
        """A folder for files from which a snapshot will be made. Raises OSError."""
        folder = Path(tempfile.mkdtemp(prefix="request-", dir=self._folder))
        return LockedFolder(folder, _lock(folder, fcntl.LOCK_SH))

    def _use(self, entry: Path, files: ModelFiles) -> int:
        """Takes a shared lock on the entry, and copies the files into it if they are not there."""
        while True:
            lock = _lock(entry, fcntl.LOCK_SH)
            if (entry / "files").is_dir():
                return lock
            os.close(lock)
            try:
                # Does not wait for the lock: the worker that copies the files keeps a shared lock while it serves them.
                lock = _lock(entry, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(random.uniform(0.5, 1.5) * _COPIED_ELSEWHERE_SECONDS)
                continue
            try:
                if not (entry / "files").is_dir():
                    _make(entry, files)
            finally:
                os.close(lock)


def _make(entry: Path, files: ModelFiles) -> None:
    partial = entry / "partial"
    if partial.exists():
        shutil.rmtree(partial)
    (partial / VERSION).mkdir(parents=True)
    for name, file in files.parts():
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (files.private and _link(file, target)):
            _copy(file, target)
    partial.rename(entry / "files")


def _link(file: BinaryIO, target: Path) -> bool:
    """Makes a hard link to the file; returns whether the file system could."""
    try:
        target.hardlink_to(opened_path(file))
    except OSError:
        return False
    return True


def _copy(file: BinaryIO, target: Path) -> None:
    with target.open("xb") as copy:
        try:
            fcntl.ioctl(copy, _FICLONE, file.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            shutil.copyfileobj(file, copy, _COPY_BYTES)


def _lock(entry: Path, kind: int) -> int:
    """A descriptor that holds the lock. Waits for the lock unless LOCK_NB is set. Creates a missing entry."""
    while True:
        entry.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            lock = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, kind)
                # The entry may have been removed and made again before the lock was taken.
                if os.path.samestat(os.fstat(lock), entry.stat()):
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)


def _remove_unused(entry: Path) -> None:
    lock = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(entry)
    except (BlockingIOError, FileNotFoundError):
        pass  # in use, or another process was faster
    finally:
        os.close(lock)
