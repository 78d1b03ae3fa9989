"""Ensures that at most one stack runs in a state folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.cli.errors import CommandError


@contextmanager
def claim(state: Path) -> Iterator[None]:
    """Locks the state folder for this process. Raises CommandError if another stack runs in it."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        file = (state / "supervisor.pid").open("a+")
    except OSError as error:
        raise CommandError(f"cannot write to {state}: {error.strerror}; choose another folder with --state") from None
    with file:
        try:
            # The kernel releases the lock when the process ends for any reason; a plain file would remain.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            raise CommandError(
                f"a stack already runs in {state} (pid {owner}); choose others with --state and --base-port"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
