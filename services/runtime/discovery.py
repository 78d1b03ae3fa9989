"""How workers are found: each announces itself in Redis, and what is not repeated is forgotten.

`rm:fleet` is the set of addresses, `rm:fleet:<address>` an Announcement that expires, `rm:fleet:version` a number that
grows with each change, so that routers need only look at one small key to know that nothing did. They share a
slot, so one server of a Redis Cluster holds them all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from ringmesh.inference.v1 import inference_pb2

from services.runtime.server import StartError

log = logging.getLogger(__name__)

ADDRESSES = "{rm:fleet}"
VERSION = "{rm:fleet}:version"
TTL_SECONDS = 5.0
HEARTBEAT_SECONDS = 1.0
# How soon a change is written, and how soon it is read.
CHANGE_SECONDS = 0.25
TIMEOUT_SECONDS = 1.0
FAILURES: Final = (RedisError, OSError, TimeoutError)


def key(address: str) -> str:
    """Where the announcement of the worker at `address` is."""
    return f"{ADDRESSES}:{address}"


def connect(url: str) -> Redis:
    """A client that neither retries nor waits long by itself. Raises StartError where the URL is not one."""
    try:
        return Redis.from_url(
            url,
            socket_connect_timeout=TIMEOUT_SECONDS,
            socket_timeout=TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
            protocol=3,
        )
    except ValueError as error:
        raise StartError(f"RINGMESH_DISCOVERY_URL: {url!r} is not a Redis URL: {error}") from None


class Announcer:
    """Keeps what `describe` says in Redis. A Redis that is down is told when it is back."""

    def __init__(self, redis: Redis, describe: Callable[[], inference_pb2.Announcement]) -> None:
        self._redis = redis
        self._describe = describe
        self._written = b""
        self._failing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Announces, from now until `close`."""
        self._task = asyncio.create_task(self._announce())

    async def close(self) -> None:
        """Takes the announcement back, where Redis answers."""
        if self._task is not None:
            self._task.cancel()
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
            # It may have lost what it knew: the next one counts as a change.
            self._written = b""
            if not self._failing:
                log.warning("not announced for now: Redis: %r", error)
            self._failing = True
        else:
            self._written = data
            if self._failing:
                log.info("announced again")
            self._failing = False
