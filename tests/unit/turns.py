"""Turns of the event loop, for tests in which others go on until they wait for something."""

import asyncio


async def turns(count: int = 50) -> None:
    """Returns after so many, however long they take; a sleep may be over after the first one on a busy machine."""
    for _ in range(count):
        await asyncio.sleep(0)
