"""Metrics of the process and its host: CPU, memory, open files, and the lag of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib.metadata import version

import psutil

from services.runtime.machine import compiled, memory
from services.runtime.telemetry.metrics import Family, Histogram, Metrics, Sample
from services.runtime.telemetry.supervisor import BACKGROUND

BUILD = Family(
    "ringmesh_build_info",
    "gauge",
    "always 1; version and build; compiled: whether compiled modules run; malloc: tcmalloc or other",
    ("service", "version", "engine", "compiled", "malloc"),
)
START = Family("ringmesh_process_start_time_seconds", "gauge", "when the process started, since the Unix epoch")
CPU = Family("ringmesh_process_cpu_seconds_total", "counter", "CPU time of the process, user and system")
MEMORY = Family("ringmesh_process_resident_memory_bytes", "gauge", "resident memory of the process")
FILES = Family("ringmesh_process_open_files", "gauge", "open files and sockets of the process")
THREADS = Family("ringmesh_process_threads", "gauge", "threads of the process")
HOST_CPU = Family("ringmesh_host_cpu_seconds_total", "counter", "CPU time of the whole host", ("mode",))
HOST_MEMORY = Family("ringmesh_host_memory_bytes", "gauge", "memory of the host", ("state",))
TASKS = Family("ringmesh_event_loop_tasks", "gauge", "asyncio tasks of the process that have not ended")
LOOP_LAG = Family("ringmesh_event_loop_lag_seconds", "histogram", "how late the event loop runs a timer")

_LAG_PERIOD_SECONDS = 0.1


class ProcessMetrics:
    """Metrics of this process; `start` begins to measure the lag of its event loop."""

    def __init__(self, service: str, engine: str, metrics: Metrics) -> None:
        self._labels = (
            service,
            version("ringmesh-server"),
            engine,
            str(compiled.is_used()).lower(),
            "tcmalloc" if memory.has_tcmalloc() else "other",
        )
        self._process = psutil.Process()
        self._lag = Histogram()
        self._loop: asyncio.AbstractEventLoop | None = None
        metrics.add(self._event_loop)
        metrics.add_slow(self._system)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        BACKGROUND.start("event loop lag", self._time)

    def _event_loop(self) -> Iterator[Sample]:
        yield Sample(LOOP_LAG, (), self._lag.buckets())
        yield Sample(TASKS, (), len(asyncio.all_tasks(self._loop)) if self._loop is not None else 0)

    async def _time(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_PERIOD_SECONDS
            await asyncio.sleep(_LAG_PERIOD_SECONDS)
            # uvloop counts in milliseconds, so a timer may fire up to one early.
            self._lag.observe(max(0, int((loop.time() - due) * 1e9)))

    def _system(self) -> Iterator[Sample]:
        process = self._process
        with process.oneshot():
            times = process.cpu_times()
            yield Sample(BUILD, self._labels, 1)
            yield Sample(START, (), process.create_time())
            yield Sample(CPU, (), times.user + times.system)
            yield Sample(MEMORY, (), process.memory_info().rss)
            yield Sample(THREADS, (), process.num_threads())
            if hasattr(process, "num_fds"):
                yield Sample(FILES, (), process.num_fds())
        for mode, seconds in psutil.cpu_times()._asdict().items():
            yield Sample(HOST_CPU, (mode,), seconds)
        host = psutil.virtual_memory()
        yield Sample(HOST_MEMORY, ("total",), host.total)
        yield Sample(HOST_MEMORY, ("available",), host.available)
