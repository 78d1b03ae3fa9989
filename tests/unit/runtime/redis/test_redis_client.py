"""Connections to a Redis that says more than it was asked."""

import asyncio
import contextlib

import pytest

from services.runtime.redis import redis_client
from services.runtime.redis.redis_url import parse_redis_url


class Talkative:
    """Numbers the commands of each connection, and says one number too many where it is `confused`."""

    def __init__(self):
        self.confused = False

    async def serve(self, reader, writer):
        count = 0
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                parts = [await self._part(reader) for _ in range(int(line[1:]))]
                if parts[0] == b"HELLO":
                    writer.write(b"%1\r\n+proto\r\n:3\r\n")
                elif parts[0] == b"GET":
                    count += 1
                    writer.write(b":%d\r\n" % count + b":1000\r\n" * self.confused)
                else:
                    writer.write(b"+OK\r\n")
        writer.close()

    async def _part(self, reader):
        size = int((await reader.readline())[1:])
        return (await reader.readexactly(size + 2))[:-2]


@pytest.fixture
async def talkative():
    server = Talkative()
    async with await asyncio.start_server(server.serve, "127.0.0.1") as listening:
        server.port = listening.sockets[0].getsockname()[1]
        yield server


async def test_a_reply_too_many_is_not_taken_for_that_of_the_next_command(talkative):
    url = parse_redis_url(f"redis://127.0.0.1:{talkative.port}", "RINGMESH_REDIS_URL")
    client = redis_client.server(url, redis_client.options(5))
    async with client:
        talkative.confused = True
        assert await client.get("a") == 1
        talkative.confused = False
        assert await client.get("b") == 1  # on another connection
        assert await client.get("c") == 2
