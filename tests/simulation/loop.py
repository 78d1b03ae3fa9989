"""An event loop without sockets, shared by many simulated processes; waiting takes no real time.

Each callback belongs to the process in whose context it was scheduled. Callbacks of a stopped or busy process wait.
Callbacks of a killed process wait for ever: freeing them could free coroutines, whose `finally` blocks would run.
"""

import asyncio
import contextlib
import contextvars
import heapq
import sys
import warnings
from asyncio import events
from collections import deque

from tests.simulation.clock import clock

PROCESS = contextvars.ContextVar("process", default=None)
NOBODY = contextvars.Context()
# Minimum duration of work on a thread: hand-over and wake-up.
_THREAD_NS = 30_000


class Process:
    """A simulated process. The callbacks in `died` are called when it is killed."""

    def __init__(self, loop, name):
        self.loop = loop
        self.name = name
        self.alive = True
        self.stopped = False
        self.busy_until_ns = 0
        # Callbacks that could not run because the process was stopped, busy or dead, in order.
        self.frozen = []
        self.died = []
        self.context = contextvars.Context()
        self.context.run(PROCESS.set, self)
        loop.processes.append(self)

    @property
    def runs(self):
        """Whether its event loop runs callbacks now."""
        return self.alive and not self.stopped and self.busy_until_ns <= clock.now_ns

    def call(self, function, *args):
        """Runs `function` on its event loop, as soon as possible."""
        self.loop.call_soon(function, *args, context=self.context)

    def call_at(self, at_ns, function, *args):
        self.loop.call_at_ns(at_ns, function, *args, context=self.context)

    def spawn(self, coroutine):
        """Starts a task in the process."""
        return self.context.run(self.loop.create_task, coroutine)

    def kill(self):
        self.alive = False
        for died in self.died:
            died()

    def stop(self):
        self.stopped = True

    def go_on(self):
        self.stopped = False
        self._thaw()

    def held(self, until_ns):
        """Marks its event loop as busy until `until_ns`, because a callback took that long."""
        self.busy_until_ns = until_ns
        self.loop.call_at_ns(until_ns, self._thaw, context=NOBODY)

    def _thaw(self):
        if self.runs:
            frozen, self.frozen = self.frozen, []
            self.loop.ready.extendleft(reversed(frozen))


class SimLoop(asyncio.BaseEventLoop):
    """The event loop. `held` is called with each process whose loop was blocked, and for how many ns."""

    def __init__(self, held):
        super().__init__()
        self.ready = deque()
        self._timers = []
        self._sequence = 0
        self._held = held
        self.processes = []
        self.tasks = []
        self.errors = []
        # Unix sockets by path.
        self.sockets = {}

    def time(self):
        return clock.seconds()

    def call_soon(self, callback, *args, context=None):
        handle = events.Handle(callback, args, self, context)
        self.ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(self, when, callback, *args, context=None):
        return self.call_at_ns(int(when * 1e9) + 1, callback, *args, context=context)

    def call_later(self, delay, callback, *args, context=None):
        return self.call_at_ns(clock.ns() + max(0, int(delay * 1e9)), callback, *args, context=context)

    def call_at_ns(self, at_ns, callback, *args, context=None):
        handle = events.TimerHandle(at_ns / 1e9, callback, args, self, context)
        self._sequence += 1
        heapq.heappush(self._timers, (at_ns, self._sequence, handle))
        return handle

    def _timer_handle_cancelled(self, handle):
        pass

    def create_task(self, coro, *, name=None, context=None):
        task = asyncio.Task(coro, loop=self, name=name or "", context=context)
        self.tasks.append(task)
        return task

    def run_in_executor(self, executor, function, *args):
        """Runs `function` on a thread of the process, from those of `executor` (None: unlimited)."""
        future = self.create_future()
        pool = executor if executor is not None else _ENDLESS
        process = PROCESS.get()
        job = (process, future, function, args)
        if pool.free:
            pool.free -= 1
            self.call_at_ns(clock.ns() + _THREAD_NS, self._run_on_thread, pool, job, context=NOBODY)
        else:
            pool.waiting.append(job)
        return future

    def _run_on_thread(self, pool, job):
        process, future, function, args = job
        if process.stopped or not process.alive:
            process.frozen.append(events.Handle(self._run_on_thread, (pool, job), self, NOBODY))
            return
        try:
            outcome = self._call(process, function, args)
        except Exception as error:
            outcome = error
        at_ns, clock.within_ns = clock.ns() + _THREAD_NS, 0
        self.call_at_ns(at_ns, self._thread_ended, pool, context=NOBODY)
        process.call_at(at_ns, settle, future, outcome)

    def _call(self, process, function, args):
        # asyncio.to_thread wraps the function.
        inner = getattr(function, "args", (None,))[0]
        if getattr(inner, "__name__", "") == "_rings":
            # Cached: ranking takes 15 ms, and its result depends only on its argument.
            key = tuple(sorted(function.args[1].items()))
            found = _RINGS.get(key)
            if found is None:
                found = _RINGS[key] = inner(function.args[1])
            return found
        return process.context.copy().run(function, *args)

    def _thread_ended(self, pool):
        if pool.waiting:
            self._run_on_thread(pool, pool.waiting.popleft())
        else:
            pool.free += 1

    def call_exception_handler(self, context):
        error = context.get("exception")
        self.errors.append(f"{context.get('message')}: {error!r}")

    def run(self, until_ns, done=lambda: False):
        """Runs until `until_ns`, until `done()`, or until no events are left."""
        ready, timers = self.ready, self._timers
        events._set_running_loop(self)
        try:
            while not done():
                if not ready:
                    while timers and timers[0][2]._cancelled:
                        heapq.heappop(timers)
                    if not timers or timers[0][0] > until_ns:
                        clock.now_ns = max(clock.now_ns, until_ns)
                        return
                    clock.now_ns = max(clock.now_ns, timers[0][0])
                while timers and timers[0][0] <= clock.now_ns:
                    handle = heapq.heappop(timers)[2]
                    if not handle._cancelled:
                        ready.append(handle)
                for _ in range(len(ready)):
                    if not ready:
                        break
                    handle = ready.popleft()
                    if not handle._cancelled:
                        self._run_handle(handle)
        finally:
            events._set_running_loop(None)

    def _run_handle(self, handle):
        context = handle._context
        process = context.get(PROCESS)
        if process is not None and not process.runs:
            process.frozen.append(handle)
            return
        try:
            context.run(handle._callback, *handle._args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.errors.append(f"callback {handle._callback!r}: {error!r}")
        if clock.within_ns:
            until_ns, took_ns = clock.ns(), clock.within_ns
            clock.within_ns = 0
            if process is not None:
                process.held(until_ns)
                self._held(process, took_ns)

    async def create_unix_connection(self, factory, path):
        if path not in self.sockets:
            raise FileNotFoundError(path)
        return await self.sockets[path].connect(factory)

    def abandon(self):
        """Kills all processes and closes what is left of their coroutines, without warnings.

        Closing a coroutine runs its `finally` blocks, outside a running loop: nothing they do or say may be counted.
        """
        for process in self.processes:
            process.kill()
        sys.unraisablehook, hook = _ignore, sys.unraisablehook
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            for task in self.tasks:
                if not task.done():
                    task._log_destroy_pending = False
                    with contextlib.suppress(BaseException):
                        task.get_coro().close()
                elif not task.cancelled():
                    task.exception()
            self.tasks.clear()
            self.ready.clear()
            self._timers.clear()
        finally:
            sys.unraisablehook = hook
        self.close()


class Threads:
    """Replaces an executor that has this number of threads."""

    def __init__(self, threads):
        self.free = threads
        self.waiting = deque()


_ENDLESS = Threads(1 << 30)
_RINGS = {}


def settle(future, outcome):
    """Sets the result or the exception of a future that may have ended already."""
    if not future.done():
        (future.set_exception if isinstance(outcome, Exception) else future.set_result)(outcome)


def _ignore(_):
    pass
