"""One process of a stack: starts, monitors, restarts and stops it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from services.cli.errors import CommandError
from services.runtime.machine.orphan import end_with_parent
from services.runtime.telemetry.supervisor import BACKGROUND

_POLL_SECONDS = 0.05
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0
_LOG_TAIL_BYTES = 8192


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to run a process. `is_ready` asks the process if it is ready; `environment` extends the inherited one."""

    name: str
    command: Sequence[str]
    address: str
    log: Path
    is_ready: Callable[[], Awaitable[object]]
    environment: Mapping[str, str] = field(default_factory=dict)


class Child:
    """The process of a spec. When it dies and when it is back, `say` gets a message, and then `changed` is called."""

    def __init__(self, spec: ChildSpec, say: Callable[[str], None], changed: Callable[[], None]) -> None:
        self.spec = spec
        self._say = say
        self._changed = changed
        self._process: asyncio.subprocess.Process | None = None
        self._log_start = 0
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """The process id; 0 if the process is not running."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process is not None and running else 0

    async def spawn(self) -> None:
        with self._open_log() as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.spec.environment},
                # Ctrl-C in a terminal signals the whole process group, but the stack stops its children in order.
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )

    async def ready(self, seconds: float) -> None:
        """Waits until the process is ready. Raises CommandError with the reason if it exits or takes too long."""
        try:
            async with asyncio.timeout(seconds):
                is_up = await self._comes_up()
        except TimeoutError:
            raise CommandError(f"{self.spec.name} is not ready after {seconds:.0f} s; see {self.spec.log}") from None
        if not is_up:
            raise CommandError(f"{self.spec.name} cannot start: {self._start_error()}; its log is {self.spec.log}")

    def keep(self) -> None:
        """Restarts the process whenever it dies from now on, with growing pauses."""
        self._keeper = BACKGROUND.start("keeper of a process", self._keep)

    async def stop(self, seconds: float) -> None:
        """Sends SIGTERM, then SIGKILL after `seconds`. If cancelled, leaves the process as it is."""
        if self._keeper is not None:
            await BACKGROUND.end(self._keeper)
        if not self.pid:
            return
        process = self._running()
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(seconds):
                await process.wait()
        except TimeoutError:
            self._say(f"{self.spec.name} (pid {process.pid}) did not stop within {seconds:.0f} s and was killed")
            self.kill()
            await process.wait()

    def kill(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        if self.pid:
            with suppress(ProcessLookupError):
                self._running().kill()

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE_SECONDS
        while True:
            began = loop.time()
            process = self._running()
            code = await process.wait()
            # After a long run the failure is a new one, so the pause starts again at its minimum.
            if loop.time() - began > _LONGEST_PAUSE_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            self._say(f"{self.spec.name} (pid {process.pid}) {self._ending(code)}; starting it again in {pause:.0f} s")
            self._changed()
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
            await self.spawn()
            if await self._comes_up():
                self._say(f"{self.spec.name} is back (pid {self.pid})")
                self._changed()

    async def _comes_up(self) -> bool:
        """Waits until the process is ready; returns False if it exits first."""
        process = self._running()
        while not await self.spec.is_ready():
            if process.returncode is not None:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True

    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "spawn() comes first"
        return self._process

    def _open_log(self) -> BinaryIO:
        self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        log = self.spec.log.open("ab")
        self._log_start = log.tell()
        return log

    def _start_error(self) -> str:
        code = self._running().returncode or 0
        # Services that refuse to start print `<service>: <reason>` and exit with code 2.
        _, _, why = self._last_line().partition(": ")
        return why if code == 2 and why else f"it {self._ending(code)}"

    def _ending(self, code: int) -> str:
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        last = self._last_line()
        return f"ended with exit code {code}" + (f" ({last})" if last and code else "")

    def _last_line(self) -> str:
        """Returns the last line of the log since the last start; "" if there is none."""
        try:
            with self.spec.log.open("rb") as log:
                log.seek(max(self._log_start, self.spec.log.stat().st_size - _LOG_TAIL_BYTES))
                lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError:  # the log was deleted
            return ""
        return lines[-1] if lines else ""
