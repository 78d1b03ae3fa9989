"""Finding workers among nonsense, and announcing oneself to a Redis that answers with nonsense."""

import asyncio
from contextlib import suppress

import pytest
from redis.asyncio import Redis
from ringmesh.inference.v1 import inference_pb2

from router.membership.discovery import AnnouncedWorkers
from services.runtime.redis.discovery import ADDRESSES, VERSION, Announcer, key
from services.runtime.telemetry.supervisor import BACKGROUND, FAILING, FAILURES


def announcement(address, **more):
    return inference_pb2.Announcement(address=address, weight=1.0, **more).SerializeToString()


class Held:
    """As the client of a Redis that holds these members and values."""

    def __init__(self, members, values):
        self.members = members
        self.values = values
        self.removed = []

    async def get(self, name):
        assert name == VERSION
        return b"1"

    async def smembers(self, name):
        assert name == ADDRESSES
        return self.members

    async def mget(self, names):
        return [self.values.get(name) for name in names]

    async def srem(self, _, *gone):
        self.removed += gone

    async def aclose(self):
        pass


async def told(redis):
    """The addresses that are found first."""
    found = asyncio.get_running_loop().create_future()
    watching = asyncio.create_task(AnnouncedWorkers(redis).watch(lambda listings: found.set_result([*listings])))
    done, _ = await asyncio.wait([watching, found], timeout=10, return_when=asyncio.FIRST_COMPLETED)
    await BACKGROUND.end(watching)
    assert found in done
    return [listing.address for listing in found.result()]


def failures(task):
    return sum(s.value for s in BACKGROUND.samples() if s.family is FAILURES and s.labels == (task,))


@pytest.mark.parametrize("nonsense", [b"\xff\xfe:1", b"no port", b":1", b"a:0", b"a:99999", b"a\0b:1", 7, b""])
async def test_a_member_that_is_no_address_is_skipped_and_counted_and_others_are_found(nonsense):
    before = failures("discovery")
    assert await told(Held([nonsense, b"w:1"], {key("w:1"): announcement("w:1")})) == ["w:1"]
    assert failures("discovery") == before + 1


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\xff",
        "text",
        announcement("other:1"),
        inference_pb2.Announcement(address="bad:1", weight=float("nan")).SerializeToString(),
        inference_pb2.Announcement(address="bad:1", weight=float("inf")).SerializeToString(),
        inference_pb2.Announcement(address="bad:1", weight=-1).SerializeToString(),
        announcement("bad:1", worker_id="a\0b"),
        announcement("bad:1", zone="a\nb"),
    ],
)
async def test_an_announcement_that_is_nonsense_is_skipped_and_others_are_found(nonsense):
    values = {key("bad:1"): nonsense, key("w:1"): announcement("w:1")}
    assert await told(Held([b"bad:1", b"w:1"], values)) == ["w:1"]


class Server:
    """Answers each command of a Redis client with `reply`."""

    reply = b"-MOVED 1 127.0.0.1:1\r\n"

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.commands = 0
        self._told = asyncio.Event()
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def more(self, count):
        """Returns when so many more commands came."""
        wanted = self.commands + count
        async with asyncio.timeout(60):
            while self.commands < wanted:
                self._told.clear()
                await self._told.wait()

    async def _connected(self, reader, writer):
        with suppress(OSError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                for _ in range(int(line[1:])):
                    await reader.readexactly(int((await reader.readline())[1:]) + 2)
                self.commands += 1
                self._told.set()
                writer.write(self.reply)
                await writer.drain()


@pytest.mark.parametrize(
    "reply", [b"-MOVED 1 127.0.0.1:1\r\n", b"-MOVED\r\n", b"+hello\r\n", b":7\r\n", b"*1\r\n:7\r\n"]
)
async def test_a_redis_that_answers_with_nonsense_does_not_end_the_announcement(reply):
    async with Server() as server:
        server.reply = reply
        redis = Redis(port=server.port)
        announcer = Announcer(redis, lambda: inference_pb2.Announcement(address="w:1", weight=1.0))
        announcer.start()
        for _ in range(3):
            await server.more(1)
        await BACKGROUND.end(announcer._task)
        await redis.aclose()


@pytest.mark.parametrize(
    "reply", [b"+hello\r\n", b":7\r\n", b"*1\r\n:7\r\n", b"-MOVED\r\n", b"-MOVED 1 127.0.0.1:1\r\n"]
)
async def test_a_redis_that_answers_with_nonsense_does_not_end_discovery(reply):
    async with Server() as server:
        server.reply = reply
        found = []
        source = AnnouncedWorkers(Redis(port=server.port))
        watching = BACKGROUND.start("discovery in a test", lambda: source.watch(found.append))
        for _ in range(3):
            await server.more(1)
        await BACKGROUND.end(watching)
        assert all(listings == [] for listings in found)


def test_what_was_skipped_is_told_with_its_reason():
    reasons = [s.labels[1] for s in BACKGROUND.samples() if s.family is FAILING and s.labels[0] == "discovery"]
    assert all("InvalidListingError" in reason for reason in reasons)
