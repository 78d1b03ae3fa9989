"""Callers that go on calling through a fault."""

import asyncio

import grpc

from tests.system.test_cache import fresh, infer


async def eventually(condition, seconds=60.0):
    """What `condition` returns when it is true."""
    async with asyncio.timeout(seconds):
        while not (found := await condition()):
            await asyncio.sleep(0.02)
    return found


class Callers:
    """One for each channel, with fresh requests while the block runs; errors are kept, and nothing is retried."""

    def __init__(self, channels, model="mlp"):
        self.workers = []
        self.errors = []
        self._channels = channels
        self._model = model
        self._stopping = False

    async def __aenter__(self):
        self._tasks = [asyncio.create_task(self._call(channel)) for channel in self._channels]
        return self

    async def __aexit__(self, *_):
        self._stopping = True
        await asyncio.gather(*self._tasks)
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def _call(self, channel):
        while not self._stopping:
            try:
                self.workers.append((await infer(channel, fresh(self._model)))[1]["ringmesh-worker"])
            except grpc.aio.AioRpcError as error:
                self.errors.append(f"{error.code().name}: {error.details()}")

    async def more(self, count=100):
        """Returns when so many more calls have ended."""
        before = len(self.workers) + len(self.errors)

        async def enough():
            return len(self.workers) + len(self.errors) >= before + count

        await eventually(enough)

    async def answered_by(self, *workers):
        """Returns when each of these and nobody else has given the last hundred answers."""

        async def are():
            return len(self.workers) >= 100 and set(self.workers[-100:]) == set(workers)

        await eventually(are)


def sixteen(address):
    """Callers on one connection."""
    return Callers([grpc.aio.insecure_channel(address)] * 16)
