"""The supervisor of `ringmesh up`, where it cannot write."""

import asyncio
import os
import signal
import sys

from services.cli.stack.child import Child, ChildSpec
from services.cli.stack.endpoints import LOOPBACK, Endpoints
from services.cli.stack.stack import Stack, StackOptions


async def test_a_process_is_started_again_while_stack_json_cannot_be_written(tmp_path):
    async def is_ready():
        return True

    state = tmp_path / "state"
    state.write_text("no folder")
    options = StackOptions(Endpoints.create(LOOPBACK, 8001, 1), state, "", tmp_path, key_secret="", drain_seconds=1)
    lines = asyncio.Queue()
    stack = Stack(options, lines.put_nowait)
    stack._is_up = True
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = Child(
        ChildSpec("one", command, "", tmp_path / "one.log", is_ready, {}), lines.put_nowait, stack._describe_again
    )
    await child.spawn()
    first = child.pid
    child.keep()
    try:
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(60):
            while "is back" not in (line := await lines.get()):
                pass
        assert str(child.pid) in line
        assert child.pid != first
    finally:
        await child.stop(5)
