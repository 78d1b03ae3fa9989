"""Worker discovery: each worker announces itself in Redis, and an announcement that is not repeated expires.

`rm:fleet` is the set of addresses. `rm:fleet:<address>` is an Announcement that expires. `rm:fleet:version` is a number
that grows with each change, so routers read one small key to see whether anything changed. The keys share a slot, so
one server of a Redis Cluster holds them all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final, TypeAlias

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import RedisClusterException, RedisError
from ringmesh.inference.v1 import inference_pb2

from services.runtime.redis import redis_client
from services.runtime.redis.redis_url import Topology, parse_redis_url
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

ADDRESSES = "{rm:fleet}"
VERSION = "{rm:fleet}:version"
TTL_SECONDS = 5.0
HEARTBEAT_SECONDS = 1.0
# Period in which workers check for changes to write, and routers for changes to read.
CHANGE_SECONDS = 0.25
TIMEOUT_SECONDS = 1.0
FAILURES: Final = (RedisError, RedisClusterException, OSError, TimeoutError)

AnyRedis: TypeAlias = "Redis | RedisCluster"


def key(address: str) -> str:
    return f"{ADDRESSES}:{address}"


def connect(url: str) -> AnyRedis:
    """Returns a client that does not retry and has short timeouts. Raises StartError if the URL is invalid."""
    found = parse_redis_url(url, "RINGMESH_DISCOVERY_URL")
    options = {**redis_client.options(TIMEOUT_SECONDS), "socket_timeout": TIMEOUT_SECONDS}
    if found.topology is Topology.CLUSTER:
        return redis_client.cluster(found, options)
    return redis_client.server(found, options)


class Announcer:
    """Keeps the announcement that `describe` returns in Redis; after an outage of Redis, it is written again."""

    def __init__(self, redis: AnyRedis, describe: Callable[[], inference_pb2.Announcement]) -> None:
        self._redis = redis
        self._describe = describe
        self._written = b""
        self._failing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = BACKGROUND.start("announcement", self._announce)

    async def close(self) -> None:
        """Removes the announcement if Redis answers, and disconnects."""
        if self._task is not None:
            await BACKGROUND.end(self._task)
            address = self._describe().address
            try:
                async with self._redis.pipeline(transaction=True) as pipeline:
                    pipeline.delete(key(address))
                    pipeline.srem(ADDRESSES, address)
                    pipeline.incr(VERSION)
                    await pipeline.execute()
            except FAILURES as error:
                log.warning("the announcement stays until it expires: Redis: %r", error)
        await self._redis.aclose()

    async def _announce(self) -> None:
        due = 0.0
        while True:
            announcement = self._describe()
            data = announcement.SerializeToString(deterministic=True)
            if data != self._written or time.monotonic() >= due:
                due = time.monotonic() + HEARTBEAT_SECONDS
                await self._write(announcement.address, data)
            await asyncio.sleep(CHANGE_SECONDS)

    async def _write(self, address: str, data: bytes) -> None:
        try:
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.set(key(address), data, px=int(TTL_SECONDS * 1000))
                pipeline.sadd(ADDRESSES, address)
                if data != self._written:
                    pipeline.incr(VERSION)
                await pipeline.execute()
        except FAILURES as error:
            # Redis may have lost its data, so the next write counts as a change.
            self._written = b""
            if not self._failing:
                log.warning("not announced for now: Redis: %r", error)
            self._failing = True
        else:
            self._written = data
            if self._failing:
                log.info("announced again")
            self._failing = False
