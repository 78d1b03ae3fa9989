"""Steady load through a fault: who failed, and what it cost the others."""

import asyncio
import time
from contextlib import asynccontextmanager

import grpc

from tests.system.test_cache import INFER, fresh


class SteadyLoad:
    """Fresh requests at a rate, answered in time or not; nothing is retried unless the channel does."""

    def __init__(self, channel, rate, model):
        self.errors = []
        self._failed = []
        self.answers = 0
        self.workers = []
        self._channel = channel
        self._model = model
        self._rate = rate
        self._phase = None
        self._phases = {}
        self._calls = set()
        self._stopping = False

    async def phase(self, name, seconds):
        """Keeps on for so long; what begins in it counts for it."""
        self._phase = self._phases.setdefault(name, [])
        await asyncio.sleep(seconds)

    def workers_of(self, name):
        """Who answered what began in this phase."""
        return {worker for _, worker in self._phases[name]}

    def failed(self, name):
        """How many failed that began in this phase."""
        return sum(phase is self._phases[name] for phase in self._failed)

    def report(self, title):
        """Latencies by phase, printed."""
        parts = []
        for name, times in self._phases.items():
            times = sorted(took for took, _ in times)
            p = lambda q, times=times: times[int(q * (len(times) - 1))] * 1e3 if times else float("nan")  # noqa: E731
            parts.append(f"{name}: {len(times)} answers, p50 {p(0.5):.1f} p99 {p(0.99):.1f} ms")
        print(f"\n{title}: {'; '.join(parts)}; failed {len(self.errors)}")

    async def run(self):
        method = self._channel.unary_unary(INFER)
        due = time.monotonic()
        while not self._stopping:
            task = asyncio.create_task(self._call(method, self._phase))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
            due += 1 / self._rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await asyncio.gather(*self._calls)

    async def _call(self, method, phase):
        begin = time.monotonic()
        call = method(fresh(self._model).SerializeToString(), timeout=60)
        try:
            await call
        except grpc.aio.AioRpcError as error:
            self.errors.append(f"{error.code().name}: {error.details()}")
            self._failed.append(phase)
            return
        self.answers += 1
        took = time.monotonic() - begin
        worker = dict(await call.trailing_metadata()).get("ringmesh-worker", "")
        phase.append((took, worker))
        self.workers.append(worker)

    def stop(self):
        self._stopping = True


@asynccontextmanager
async def steady_load(target, *, rate=150, model="mlp", options=()):
    """Runs while the block does; its last calls are answered before it ends."""
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        await channel.channel_ready()
        load = SteadyLoad(channel, rate, model)
        await load.phase("before", 0)
        running = asyncio.create_task(load.run())
        try:
            yield load
        finally:
            load.stop()
            await running
