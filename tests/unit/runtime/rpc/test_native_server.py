"""How the native engine accepts connections."""

import asyncio
import errno
import socket
from contextlib import ExitStack
from unittest.mock import Mock

import uvloop

from services.runtime.rpc.native_server import NativeServer

LIMIT = 4 << 20


async def started(place="127.0.0.1:0"):
    server = NativeServer({}, LIMIT)
    port = server.add_insecure_port(place)
    await server.start()
    return server, port


async def turns(number):
    for _ in range(number):
        await asyncio.sleep(0)


def test_clients_that_come_together_do_not_wait_for_a_turn_of_the_event_loop_each():
    """libuv's own servers accept one connection in each turn."""

    async def come_together():
        server, port = await started()
        with ExitStack() as stack:
            for _ in range(50):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            await turns(10)
            assert len(server.numbered()) == 50
        await server.stop(0)

    uvloop.run(come_together())


def test_connections_wait_while_a_server_is_out_of_descriptors(monkeypatch, caplog):
    monkeypatch.setattr("services.runtime.rpc.native_server._ACCEPT_AGAIN_SECONDS", 0.01)
    accept = Mock(side_effect=OSError(errno.EMFILE, "Too many open files"))

    async def run_out():
        server, port = await started()
        with monkeypatch.context() as patched:
            patched.setattr(socket.socket, "accept", accept)
            client = socket.create_connection(("127.0.0.1", port))
            while accept.call_count < 2:
                await asyncio.sleep(0.001)
            assert not server.numbered()
        while not server.numbered():
            await asyncio.sleep(0.001)
        client.close()
        await server.stop(0)

    asyncio.run(asyncio.wait_for(run_out(), 10))
    assert "cannot accept connections: [Errno 24] Too many open files" in caplog.text


def test_a_client_that_leaves_before_it_is_accepted_does_no_harm(tmp_path):
    async def leave():
        for place in ("127.0.0.1:0", f"unix:{tmp_path}/s"):
            server, port = await started(place)
            family, address = (socket.AF_INET, ("127.0.0.1", port)) if port > 1 else (socket.AF_UNIX, f"{tmp_path}/s")
            for _ in range(20):
                with socket.socket(family) as gone:
                    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    gone.connect(address)
            with socket.socket(family) as client:
                client.connect(address)
                client.setblocking(False)
                assert await asyncio.get_running_loop().sock_recv(client, 9)
                while len(server.numbered()) > 1:
                    await asyncio.sleep(0.001)
            await server.stop(0)

    uvloop.run(asyncio.wait_for(leave(), 10))
