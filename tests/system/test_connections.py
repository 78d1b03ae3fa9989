"""Connections find the servers that are there: shared ports, drains, and connections that grow old."""

import asyncio
import os
import signal
import subprocess
import sys
from functools import partial

import grpc
import pytest

from tests.system.callers import Callers, eventually
from tests.system.processes import free_address

pytestmark = pytest.mark.both_engines


async def connections(address, count):
    """Channels with a connection each."""
    channels = [
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(count)
    ]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    return channels


async def accepted(started):
    """Connections that a process has taken at its address."""
    port = int(started.address.rpartition(":")[2])
    return sum(
        connection.laddr.port == port and connection.status == "ESTABLISHED"
        for connection in started.info.net_connections("tcp")
    )


async def have_accepted(routers, count):
    """Whether these have so many together."""
    return sum([await accepted(router) for router in routers]) == count


async def listens(started):
    """The first on a shared port may answer for those that are not up yet."""
    port = int(started.address.rpartition(":")[2])
    return any(
        connection.status == "LISTEN" and connection.laddr.port == port
        for connection in started.info.net_connections("tcp")
    )


async def test_routers_that_share_a_port_share_its_connections_and_one_that_stops_hands_its_callers_over(
    start_router, stack
):
    address = free_address()
    routers = [start_router(stack.workers, None, address=address, share_port="true") for _ in range(2)]
    await eventually(partial(listens, routers[1]))
    async with Callers(await connections(address, 24)) as callers:
        await callers.more()
        # Nothing is open any more of those who waited for the routers to serve.
        await eventually(partial(have_accepted, routers, 24))
        assert min([await accepted(router) for router in routers]) > 0
        routers[0].process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(routers[0].process.wait, 60) == 0
        await eventually(partial(have_accepted, routers[1:], 24))
        await callers.more()
    assert callers.errors == []


def test_a_router_that_was_not_told_to_share_its_port_is_refused(start_router, stack, engine):
    taken = start_router(stack.workers, None, share_port="true").address
    settings = {"ADDRESS": taken, "ENGINE": engine, "WORKERS": stack.workers[0]}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "router"],
        env={**os.environ, **{f"RINGMESH_{name}": value for name, value in settings.items()}},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"cannot listen on {taken}" in done.stderr.splitlines()[-1]


async def test_old_connections_move_to_a_router_that_came_later_and_no_call_fails(start_router, stack):
    address = free_address()
    settings = {"address": address, "share_port": "true", "max_connection_age_seconds": 1.5}
    start_router(stack.workers, None, **settings)
    async with Callers(await connections(address, 16)) as callers:
        late = await asyncio.to_thread(start_router, stack.workers, None, **settings)

        async def found():
            return await accepted(late) > 0

        await eventually(found)
        await callers.more()
    assert callers.errors == []
