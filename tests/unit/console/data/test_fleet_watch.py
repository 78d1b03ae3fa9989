"""The channels of the console to the processes of its fleet."""

import asyncio

import grpc
import pytest

from services.console.data.fleet_watch import FleetWatch

ECHO = "/test.Test/Echo"


@pytest.fixture
async def fleet():
    """Of one router, whose `calls` are the peer and the metadata of each call."""
    calls = []

    async def echo(data, context):
        calls.append((context.peer(), dict(context.invocation_metadata())))
        return data

    server = grpc.aio.server()
    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    fleet = FleetWatch((address,), address, "the credential")
    fleet.calls = calls
    yield fleet
    await fleet.close()
    await server.stop(0)


async def test_the_consoles_own_calls_share_a_connection_and_those_of_a_visitor_do_not_use_it(fleet):
    address = fleet.view.cache.address
    for authorization in ("", "", "Bearer of a visitor"):
        async with fleet.calling(address, authorization) as channel:
            await channel.unary_unary(ECHO)(b"")
    (first, own), (second, _), (visitors, sent) = fleet.calls
    assert first == second != visitors
    assert (own["ringmesh-credential"], own.get("authorization")) == ("the credential", None)
    assert (sent.get("ringmesh-credential"), sent["authorization"]) == (None, "Bearer of a visitor")


async def test_the_channel_of_a_worker_that_has_left_is_closed(fleet):
    gone, router = fleet.channel("127.0.0.1:1"), fleet.channel(fleet.view.cache.address)
    await fleet._ask_workers([])
    async with asyncio.timeout(60):
        while gone.get_state() is not grpc.ChannelConnectivity.SHUTDOWN:
            await asyncio.sleep(0)
    assert fleet.channel("127.0.0.1:1") is not gone
    assert fleet.channel(fleet.view.cache.address) is router
