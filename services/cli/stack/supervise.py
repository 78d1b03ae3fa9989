"""Runs a stack for the duration of some work, and stops it in any case."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable

from services.cli.stack.stack import Stack

_KILLED = 130


async def supervise(stack: Stack, work: Callable[[], Awaitable[int]], *, interrupted: int) -> int:
    """Starts the stack, runs `work`, stops the stack, and returns the exit code of `work`.

    SIGINT or SIGTERM ends the work early: the stack drains, and the exit code is `interrupted`. A second signal kills
    the stack. Raises CommandError if the stack cannot start.
    """

    async def start_and_work() -> int:
        await stack.start()
        return await work()

    task = asyncio.create_task(start_and_work())
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        task.cancel()
        if signals > 1:
            stack.kill()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        try:
            code = await task
        except asyncio.CancelledError:
            code = interrupted
        finally:
            await stack.stop()
    finally:
        stack.kill()
    return _KILLED if signals > 1 else code
