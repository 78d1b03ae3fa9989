"""GOAWAY beside the frames of grpcio: on connections that are established, and on none before."""

import asyncio
import socket

import pytest

from services.runtime.rpc.connections import Connections
from services.runtime.rpc.server import Engine, Server

SETTINGS = b"\0\0\0\4\0\0\0\0\0"


@pytest.fixture
def pair():
    """Both ends of a connection, the server's first, and the connections at its port."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            client.settimeout(20)
            yield accepted, client, Connections(server.getsockname()[1])


async def test_a_connection_on_which_the_engine_has_sent_nothing_is_asked_to_go_when_it_has(pair):
    accepted, client, connections = pair
    assert not await connections.release(0.0)
    accepted.sendall(SETTINGS)
    assert client.recv(len(SETTINGS), socket.MSG_WAITALL) == SETTINGS  # so it is acknowledged, or soon
    while not await connections.release(1.0):
        pass
    assert client.recv(9, socket.MSG_WAITALL)[3] == 7  # GOAWAY


async def test_a_connection_is_open_until_it_is_closed_here(pair):
    accepted, _, connections = pair
    assert await connections.are_open()
    accepted.close()
    assert not await connections.are_open()


@pytest.mark.parametrize("engine", list(Engine))
async def test_a_server_without_connections_waits_for_no_requests_when_it_stops(engine, monkeypatch):
    monkeypatch.setattr("services.runtime.rpc.server._LEAVE_SECONDS", 3600)
    server = Server(engine, "127.0.0.1:0", [], max_message_bytes=1000, max_connection_age=60)
    await server.start()
    async with asyncio.timeout(60):
        await server.stop(0)
