"""Background work of a process: failed work is restarted, counted, and shown on the console.

There is one supervisor a process, like its log. Components start their work here, and end it themselves if the order
matters; `close` ends the rest.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final

from services.runtime.telemetry.metrics import Counter, Family, Sample

log = logging.getLogger(__name__)

FAILURES = Family("ringmesh_background_failures_total", "counter", "unexpected failures of background tasks", ("task",))
RUNNING = Family("ringmesh_background_tasks", "gauge", "background tasks that run now", ("task",))
FAILING = Family(
    "ringmesh_background_failing",
    "gauge",
    "always 1; background tasks that failed within the last minute, with the last reason",
    ("task", "reason"),
)

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 10.0
# Work that has not failed for this long counts as healthy.
_WELL_SECONDS = 60.0
_CANCEL_SECONDS = 0.25
_LONGEST_REASON = 200
_MOST_LOGGED = 1000


class Supervisor:
    """Keeps work running; `pause` waits for the given seconds before a restart."""

    def __init__(self, pause: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep) -> None:
        self._pause = pause
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failures = Counter(FAILURES)
        self._running: dict[str, int] = {}
        # By name: the time and reason of the last failure.
        self._failing: dict[str, tuple[float, str]] = {}
        self._logged: set[tuple[str, str]] = set()

    def start(self, name: str, work: Callable[[], Coroutine[Any, Any, object]]) -> asyncio.Task[None]:
        """Runs `work` until it returns or the task is cancelled; if it raises, restarts it after a growing pause.

        `name` is a metric label, shared by all work of one kind.
        """
        return self._keep(self._run(name, work))

    def every(self, seconds: float, name: str, work: Callable[[], object]) -> asyncio.Task[None]:
        """Calls `work` after every `seconds`; failures as in `start`."""

        async def repeat() -> None:
            while True:
                await asyncio.sleep(seconds)
                work()

        return self.start(name, repeat)

    def once(self, name: str, work: Callable[[], Coroutine[Any, Any, object]]) -> asyncio.Task[Any]:
        """Runs `work` once: a failure is counted and logged, not raised."""
        return self._keep(self._run_once(name, work))

    async def end(self, *tasks: asyncio.Task[Any]) -> None:
        """Cancels tasks and waits for their end; repeats the cancellation, as libraries such as redis swallow it."""
        left: set[asyncio.Task[Any]] = {*tasks}
        while left:
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=_CANCEL_SECONDS)

    async def close(self) -> None:
        await self.end(*(task for task in self._tasks if task is not asyncio.current_task()))

    def samples(self) -> Iterator[Sample]:
        yield from self._failures.samples()
        for name, count in self._running.items():
            yield Sample(RUNNING, (name,), count)
        now = time.monotonic()
        self._failing = {name: last for name, last in self._failing.items() if now - last[0] < _WELL_SECONDS}
        for name, (_, reason) in self._failing.items():
            yield Sample(FAILING, (name, reason), 1)

    def _keep(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, name: str, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            began = time.monotonic()
            if await self._run_once(name, work) or _is_cancelled():
                return
            if time.monotonic() - began > _WELL_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            await self._pause(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _run_once(self, name: str, work: Callable[[], Coroutine[Any, Any, object]]) -> bool:
        """Runs `work`; returns False if it failed."""
        self._running[name] = self._running.get(name, 0) + 1
        try:
            await work()
        except Exception as error:
            self.failed(name, error)
            return False
        finally:
            self._running[name] -= 1
        return True

    def failed(self, name: str, error: Exception) -> None:
        """Reports a failure of work that goes on: it is counted, and logged once for each reason."""
        reason = f"{type(error).__name__}: {error}"[:_LONGEST_REASON]
        self._failures.add(name)
        self._failing[name] = (time.monotonic(), reason)
        if (name, reason) in self._logged:
            return
        if len(self._logged) >= _MOST_LOGGED:
            self._logged.clear()
        self._logged.add((name, reason))
        log.error("work in the background failed: %s: %s", name, reason, exc_info=error)


def _is_cancelled() -> bool:
    """Whether the task was cancelled, even if a failure in its cleanup hides that."""
    task = asyncio.current_task()
    return task is not None and bool(task.cancelling())


BACKGROUND: Final = Supervisor()
