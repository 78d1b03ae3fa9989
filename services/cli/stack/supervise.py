"""Brings a stack up for as long as some work takes, and down again whatever happens."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable

from services.cli.stack.stack import Stack

_KILLED = 130


async def supervise(stack: Stack, work: Callable[[], Awaitable[int]], *, interrupted: int) -> int:
    """The exit code of `work`, which runs while the stack is up.

    SIGINT or SIGTERM ends it early: the stack drains, and `interrupted` is the code. A second one kills.
    Raises CommandError where the stack cannot start.
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
