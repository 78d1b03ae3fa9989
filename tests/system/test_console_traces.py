"""Spans on their way into the console, on both engines."""

import asyncio

import pytest

from tests.system.test_cache import fresh
from tests.system.test_console import get, shows
from tests.system.test_tracing import traced

pytestmark = pytest.mark.both_engines


async def complete_trace(stack, console):
    """The id of a trace that has come whole; on a machine that is busy, an exporter may give one up."""
    while True:
        trace_id, _, _ = await traced(stack.router, fresh())
        for _ in range(50):
            if await asyncio.to_thread(shows, f"{console}/traces/{trace_id}", "onnxruntime run", "ModelInfer"):
                return trace_id
            await asyncio.sleep(0.1)


async def test_a_traced_request_is_found_and_told_in_words(stack, console):
    async with asyncio.timeout(120):
        trace_id = await complete_trace(stack, console)
    _, _, page = await asyncio.to_thread(get, f"{console}/traces/{trace_id}")
    for words in ("No cache had the answer", "It was sent to worker-", "the owner of its key", "CPUExecutionProvider"):
        assert words in page
    _, _, listing = await asyncio.to_thread(get, f"{console}/traces?model=mlp&cache=miss&text={trace_id}")
    assert f"/traces/{trace_id}" in listing
    _, _, other = await asyncio.to_thread(get, f"{console}/traces?model=mlp&cache=hit-local&text={trace_id}")
    assert f"/traces/{trace_id}" not in other
