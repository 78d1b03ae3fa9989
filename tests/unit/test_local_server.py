"""Where a server's Unix socket is: for its user alone, and gone when nobody listens."""

import asyncio
import socket
import time
from pathlib import Path

import pytest

from router.http2 import PREFACE, Frame
from services.runtime.local_server import LocalServer
from services.runtime.server import Engine, Server


def listener(address):
    return Server(Engine.NATIVE, address, [], max_message_bytes=1 << 20, max_connection_age=300)


async def test_only_the_owner_may_enter_and_it_is_removed_at_the_end(tmp_path):
    local = LocalServer(str(tmp_path), listener)
    path = Path(await local.start())
    assert [place.stat().st_mode & 0o777 for place in (path, path.parent)] == [0o600, 0o700]
    await local.stop(0)
    assert list(tmp_path.iterdir()) == []


async def test_one_that_stopped_keeps_no_core_busy(tmp_path):
    local = LocalServer(str(tmp_path), listener)
    await local.start()
    await local.stop(0)
    before = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - before < 0.2


@pytest.mark.parametrize("engine", [Engine.NATIVE, Engine.GRPCIO])
async def test_who_is_connected_is_asked_to_go_when_it_stops(tmp_path, engine):
    def listener(address):
        return Server(engine, address, [], max_message_bytes=1 << 20, max_connection_age=300)

    local = LocalServer(str(tmp_path), listener)
    reader, writer = await asyncio.open_unix_connection(await local.start())
    writer.write(PREFACE + bytes((0, 0, 0, Frame.SETTINGS, 0, 0, 0, 0, 0)))
    received = await reader.read(100)
    stopping = asyncio.create_task(local.stop(0))
    async with asyncio.timeout(20):
        while more := await reader.read(100):
            received += more
    assert bytes((0, 0, 8, Frame.GOAWAY, 0, 0, 0, 0, 0, 0x7F, 0xFF, 0xFF, 0xFF)) in received
    writer.close()
    await stopping


async def test_what_killed_processes_left_is_removed_and_what_is_listened_on_stays(tmp_path):
    for name in ("dead", "alive"):
        (tmp_path / f"ringmesh-{name}").mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "ringmesh-dead/grpc.sock"))
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(tmp_path / "ringmesh-alive/grpc.sock"))
        alive.listen()
        local = LocalServer(str(tmp_path), listener)
        path = Path(await local.start())
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "ringmesh-alive", path.parent])
        await local.stop(0)


@pytest.mark.parametrize("folder", ["", "missing", "x" * 100])
async def test_where_there_can_be_no_socket_there_is_none(tmp_path, folder):
    if len(folder) == 100:  # too long for the path of a socket
        (tmp_path / folder).mkdir()
    local = LocalServer(folder and str(tmp_path / folder), listener)
    assert await local.start() == ""
    await local.stop(0)
    assert [*tmp_path.rglob("ringmesh-*")] == []
