"""Whatever a Redis server answers, or does to its connections, those that look something up are told at once."""

import asyncio
import contextlib
import time

import pytest
from hiredis import Reader

from cache.tiers.breaker import Breaker
from cache.tiers.redis_connection import GivenUpError
from cache.tiers.redis_node import Fill, RedisMetrics, RedisNode
from services.runtime.redis import redis_client
from services.runtime.redis.redis_url import parse_redis_url

FRAME = b"$5\r\nframe\r\n"
NONE = b"_\r\n"
OK = b"+OK\r\n"
READ_ONLY = b"-READONLY You can't write against a read only replica.\r\n"


class Server:
    """Answers GET with `get`, SET with `set`; b"": with nothing any more, None: ends the connection."""

    def __init__(self):
        self.get = FRAME
        self.set = OK
        self.writers = []
        self.commands = []

    async def serve(self, reader, writer):
        self.writers.append(writer)
        commands = Reader()
        is_silent = False
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                commands.feed(data)
                while (command := commands.gets()) is not False:
                    self.commands.append(command)
                    reply = self._reply(command[0])
                    if reply is None:
                        writer.transport.abort()
                        return
                    is_silent = is_silent or not reply
                    if not is_silent:
                        writer.write(reply)
        writer.close()

    def _reply(self, command):
        return {
            b"HELLO": b"%1\r\n+proto\r\n:3\r\n",
            b"GET": self.get,
            b"SET": self.set,
            b"PING": b"+PONG\r\n",
        }.get(command, OK)


@pytest.fixture
async def server():
    made = Server()
    async with await asyncio.start_server(made.serve, "127.0.0.1", limit=1 << 20) as listening:
        made.port = listening.sockets[0].getsockname()[1]
        yield made
        for writer in made.writers:
            writer.transport.abort()


@pytest.fixture
async def node(server):
    url = parse_redis_url(f"redis://127.0.0.1:{server.port}", "RINGMESH_REDIS_URL")
    made = Node(redis_client.server(url, redis_client.options(5)))
    assert await made.get(b"a") == b"frame"
    yield made
    await made.close()


class Node:
    """A RedisNode, and what was told of it."""

    def __init__(self, client, budget_seconds=10.0):
        self.client = client
        self.metrics = RedisMetrics()
        self.filled = []
        self.breaker = Breaker(time.monotonic, first_pause=0.01)
        self.node = RedisNode(
            "r:1",
            client,
            budget_seconds=budget_seconds,
            breaker=self.breaker,
            on_failure=lambda: None,
            on_fill=lambda fill, error: self.filled.append((fill, error)),
            metrics=self.metrics,
        )
        self.get, self.put, self.close = self.node.get, self.node.put, self.node.close

    @property
    def failures(self):
        """How many there were by kind."""
        return {sample.labels[0]: sample.value for sample in self.metrics.errors.samples()}


async def both(node):
    async with asyncio.timeout(60):
        return await asyncio.gather(node.get(b"a"), node.get(b"b"))


async def used_again(node):
    async with asyncio.timeout(60):
        while await both(node) != [b"frame", b"frame"]:
            await asyncio.sleep(0.005)


NONSENSE = [
    b"*0\r\n",
    b"*1\r\n$1\r\na\r\n",
    b":7\r\n",
    b"#f\r\n",
    b",0.5\r\n",
    b"%1\r\n+a\r\n+b\r\n",
    b"HTTP/1.1 400 Bad Request\r\n",
    b"-MOVED nowhere\r\n",
]


@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_look_ups_that_are_answered_with_nonsense_are_given_up(server, node, nonsense):
    server.get = nonsense
    assert all(isinstance(reply, GivenUpError) for reply in await both(node))
    assert node.breaker.is_open
    assert node.failures == {"damaged": 1}
    server.get = FRAME
    await used_again(node)


async def test_what_is_held_and_what_is_not_is_told(server, node):
    assert await both(node) == [b"frame", b"frame"]
    server.get = NONE
    assert await both(node) == [None, None]


async def test_a_reply_too_many_is_not_taken_for_that_of_the_next_command(server, node):
    server.get = FRAME + b"$5\r\nextra\r\n"
    assert await node.get(b"a") == b"frame"
    server.get = NONE
    assert await node.get(b"a") is None
    assert len(server.writers) == 2


async def test_a_push_message_is_no_reply(server, node):
    server.get = b">2\r\n+moving\r\n:1\r\n" + FRAME
    assert await both(node) == [b"frame", b"frame"]


async def test_a_connection_that_ends_gives_up_all_that_wait_on_it_at_once(server, node):
    server.get = None
    assert all(isinstance(reply, GivenUpError) for reply in await both(node))
    assert node.failures == {"lost": 1}
    server.get = FRAME
    await used_again(node)


async def test_a_connection_that_the_server_closed_while_idle_is_no_failure(server, node):
    server.writers[0].close()
    await server.writers[0].wait_closed()
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        while not node.node._quick.is_over:
            await asyncio.sleep(0)
    assert await both(node) == [b"frame", b"frame"]
    assert node.failures == {}


async def test_a_look_up_is_given_up_when_its_budget_is_over(server, node):
    slow = Node(node.client, budget_seconds=0.5)
    assert await slow.get(b"a") == b"frame"
    server.get = b""
    assert all(isinstance(reply, GivenUpError) for reply in await both(slow))
    assert slow.failures == {"slow": 1}
    server.get = FRAME
    await used_again(slow)
    await slow.close()


async def test_a_server_that_cannot_be_reached_gives_up_what_waits_for_it():
    url = parse_redis_url("unix:///nowhere/at/all", "RINGMESH_REDIS_URL")
    node = Node(redis_client.server(url, redis_client.options(5)))
    assert all(isinstance(reply, GivenUpError) for reply in await both(node))
    node.put(Fill(b"a", b"frame", 1000))
    assert isinstance(node.filled[0][1], GivenUpError)
    await node.close()


async def test_a_look_up_under_way_is_given_up_when_the_node_is_closed(server, node):
    server.get = b""
    look_up = node.get(b"a")
    closing = asyncio.create_task(node.close())
    async with asyncio.timeout(60):
        assert isinstance(await look_up, GivenUpError)
        await closing


async def test_a_fill_is_written_with_its_time_to_live(server, node):
    fills = [Fill(b"small", b"frame", 1000), Fill(b"large", bytes(100_000), 2000)]
    for fill in fills:
        node.put(fill)
    async with asyncio.timeout(60):
        while len(node.filled) < 2:
            await asyncio.sleep(0.001)
    assert {fill.name: error for fill, error in node.filled} == {b"small": None, b"large": None}
    assert [b"SET", b"small", b"frame", b"PX", b"1000"] in server.commands
    assert [b"SET", b"large", bytes(100_000), b"PX", b"2000"] in server.commands


async def test_what_was_put_is_written_before_the_node_is_closed(server, node):
    node.put(Fill(b"small", b"frame", 1000))
    await node.close()
    assert [error for _, error in node.filled] == [None]


async def test_fills_leave_in_one_write_with_a_look_up(server, node):
    node.put(Fill(b"a", b"frame", 1000))
    assert await node.get(b"a") == b"frame"
    assert [error for _, error in node.filled] == [None]


async def test_fills_beyond_what_the_server_takes_are_dropped(server, node):
    server.set = b""
    for index in range(100):
        node.put(Fill(b"%d" % index, bytes(1 << 20), 1000))
    assert 30 < sum(isinstance(error, GivenUpError) for _, error in node.filled) < 40  # above 64 MB
    assert await node.get(b"a") == b"frame"  # and hold up no look-up


async def test_look_ups_beyond_what_may_wait_are_given_up(server, node):
    server.get = b""
    look_ups = [node.get(b"a") for _ in range(20_000)]
    assert not look_ups[0].done()
    assert look_ups[-1].done()
    assert node.metrics.get_times.sum_ns < 10_000_000_000 * len(look_ups)


async def test_a_read_only_server_is_connected_to_anew(server, node):
    server.set = READ_ONLY
    node.put(Fill(b"a", b"frame", 1000))
    async with asyncio.timeout(60):
        while not node.filled:
            await asyncio.sleep(0.001)
    assert await node.get(b"a") == b"frame"
    assert len(server.writers) == 2
    for _ in range(10):  # but not for each fill
        node.put(Fill(b"a", b"frame", 1000))
        assert await node.get(b"a") == b"frame"
    assert len(server.writers) == 2


async def test_a_server_that_refuses_look_ups_is_skipped(server, node):
    server.get = b"-LOADING Redis is loading the dataset in memory\r\n"
    assert all(isinstance(reply, GivenUpError) for reply in await both(node))
    assert node.failures == {"refused": 1}


async def test_a_key_of_another_type_costs_no_other_look_up(server, node):
    server.get = b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"
    assert all(isinstance(reply, Exception) and not isinstance(reply, GivenUpError) for reply in await both(node))
    assert not node.breaker.is_open
