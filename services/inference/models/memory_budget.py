"""Limits the memory of models: the least recently used model is unloaded to make room for a requested one.

The mechanism is ModelMesh's (kserve/modelmesh), for one worker. Models are loaded one at a time, in the order of the
requests for them. When a model is loaded, it accepts all requests that wait for it before it can be unloaded again. If
more models are in use than fit, each therefore answers all its waiting requests in its turn.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count

import psutil

from services.inference.execution.model import ModelLoadError, OnnxModel
from services.inference.repository.repository import ModelFiles
from services.inference.scheduling.request_queue import MAX_QUEUE
from services.runtime.errors import DeadlineExceededError, ResourceExhaustedError, UnavailableError
from services.runtime.machine import memory


class ModelReplacedError(UnavailableError):
    """The model was removed, or replaced by another version of its files, before the request could use it."""


class Resident:
    """A model under the budget. Only MemoryBudget writes to it. `bytes`: its memory while `loaded`."""

    def __init__(self, budget: MemoryBudget, model: OnnxModel, files: ModelFiles, size: int) -> None:
        self.budget = budget
        self.model = model
        self.files = files
        self.bytes = size
        self.loaded = True
        self.loads = 1
        # Why the last attempt to load it again failed; "" if it succeeded.
        self.failure = ""
        self.waiting: list[asyncio.Future[None]] = []
        # It is being unloaded: new requests wait.
        self.leaving = False
        self.removed = False
        self.using = 0
        self.used = 0
        self.drained: asyncio.Future[None] | None = None
        self.loading: asyncio.Task[None] | None = None


class MemoryBudget:
    """Keeps models within `limit` bytes. A model in use is never unloaded.

    While a version is replaced, the old and the new one are both in memory, even if that exceeds the limit. The size of
    a model is the growth of the process at its first load, and at least the size of its files.
    """

    def __init__(
        self,
        limit: int,
        open_model: Callable[[ModelFiles], OnnxModel],
        process_memory: Callable[[], int],
        on_change: Callable[[], None],
    ) -> None:
        """`open_model` and `process_memory` (in bytes) run on a thread. `on_change` is called after each load and
        unload."""
        self._limit = limit
        self._process_memory = process_memory
        self._open_model = open_model
        self._on_change = on_change
        self._residents: set[Resident] = set()
        self._changing = asyncio.Lock()
        self._uses = count(1)

    async def add(self, files: ModelFiles, beside: list[Resident]) -> Resident:
        """Loads a model for the first time. `beside` stay loaded. Raises ModelLoadError, also if it can never fit."""
        async with self._changing:
            least = files.size()
            self._check(files, least)
            await self._make_room(least, beside)
            model, grown = await asyncio.to_thread(self._open, files)
            resident = Resident(self, model, files, max(least, grown))
            resident.used = next(self._uses)
            self._residents.add(resident)
            try:
                self._check(files, resident.bytes)
                await self._make_room(0, [resident, *beside])
            except BaseException:
                self._residents.discard(resident)
                raise
            return resident

    async def enter(self, resident: Resident, deadline: float | None) -> None:
        """Marks the model as in use, and loads it first if needed. The caller must call `leave` afterwards.

        Raises DeadlineExceededError, ResourceExhaustedError if too many requests wait, ModelReplacedError, and
        UnavailableError if the model cannot be loaded.
        """
        if resident.loaded and not resident.leaving:
            resident.using += 1
            return
        if resident.removed:
            raise ModelReplacedError(f"model {resident.model.name!r} was replaced; retry")
        if len(resident.waiting) >= MAX_QUEUE:
            raise ResourceExhaustedError(f"model {resident.model.name!r} is being loaded and {MAX_QUEUE} requests wait")
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        resident.waiting.append(waiter)
        if resident.loading is None:
            resident.loading = asyncio.create_task(self._load(resident))
        timer = None if deadline is None else loop.call_later(deadline - time.monotonic(), _expire, waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.leave(resident)  # it was marked as in use just before
            raise
        finally:
            if timer is not None:
                timer.cancel()
            with suppress(ValueError):
                resident.waiting.remove(waiter)

    def leave(self, resident: Resident) -> None:
        resident.using -= 1
        resident.used = next(self._uses)
        if not resident.using and resident.drained is not None and not resident.drained.done():
            resident.drained.set_result(None)

    async def load(self, resident: Resident) -> None:
        """Loads the model now if it is not loaded. Raises UnavailableError."""
        await self.enter(resident, None)
        self.leave(resident)

    async def remove(self, resident: Resident) -> None:
        """Removes a model for good, after the requests that use it or wait for it."""
        while resident.waiting or resident.loading:
            await asyncio.wait([*resident.waiting, *([resident.loading] if resident.loading else [])])
        resident.removed = True
        async with self._changing:
            await self._unload(resident)
            self._residents.discard(resident)

    async def _load(self, resident: Resident) -> None:
        try:
            async with self._changing:
                if not resident.loaded:
                    await self._make_room(resident.bytes, [])
                    await asyncio.to_thread(self._open_again, resident)
                    resident.loaded, resident.failure = True, ""
                    resident.loads += 1
                # Under the lock, so that no other model can unload this one first.
                for waiter in resident.waiting:
                    if not waiter.done():
                        resident.using += 1
                        waiter.set_result(None)
                resident.used = next(self._uses)
        except BaseException as error:
            resident.failure = str(error)
            message = f"model {resident.model.name!r} was unloaded for room, and cannot be loaded again: {error}"
            for waiter in resident.waiting:
                if not waiter.done():
                    waiter.set_exception(UnavailableError(message))
            if not isinstance(error, Exception):
                raise
        finally:
            resident.waiting.clear()
            resident.loading = None
            self._on_change()

    async def _make_room(self, size: int, keep: list[Resident]) -> None:
        while sum(resident.bytes for resident in self._residents if resident.loaded) + size > self._limit:
            others = [resident for resident in self._residents if resident.loaded and resident not in keep]
            if not others:
                return
            await self._unload(min(others, key=lambda resident: (resident.using > 0, resident.used)))
            self._on_change()

    async def _unload(self, resident: Resident) -> None:
        """Unloads a model once the requests that use it are answered. New requests for it wait."""
        resident.leaving = True
        try:
            if resident.using:
                resident.drained = asyncio.get_running_loop().create_future()
                await resident.drained
            if resident.loaded:
                resident.loaded = False
                await asyncio.to_thread(_release, resident.model)
        finally:
            resident.leaving, resident.drained = False, None

    def _check(self, files: ModelFiles, size: int) -> None:
        if size > self._limit:
            raise ModelLoadError(
                f"cannot load {files.origin}: it takes {size} bytes of memory, and RINGMESH_MODEL_MEMORY_BYTES is "
                f"{self._limit}"
            )

    def _open(self, files: ModelFiles) -> tuple[OnnxModel, int]:
        """On a thread. Returns the model and the growth of the process in bytes."""
        _give_back()
        before = self._process_memory()
        model = self._open_model(files)
        _give_back()
        return model, self._process_memory() - before

    def _open_again(self, resident: Resident) -> None:
        """On a thread: loads an unloaded model again. Raises ModelLoadError."""
        fresh = self._open_model(resident.files)
        if fresh.digest != resident.model.digest:
            raise ModelLoadError(f"it ran on {resident.model.provider}, and now would on {fresh.provider}")
        resident.model.restore(fresh)
        _give_back()


def resident_memory() -> int:
    return int(psutil.Process().memory_info().rss)


def _expire(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(DeadlineExceededError("the deadline passed while the model was loaded"))


def _release(model: OnnxModel) -> None:
    model.release()
    _give_back()


def _give_back() -> None:
    """Returns freed memory to the system. Its malloc would keep it, up to hundreds of MB per model."""
    if (malloc := memory.malloc()) is not None:
        malloc.give_back(sys.maxsize)
