"""The tier in Redis, shared by the fleet. A look-up never raises and never waits longer than its budget."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import AskError, MovedError

from cache.tiers.breaker import Breaker
from cache.tiers.entry import Entry, EntryFrames, is_answer
from cache.tiers.redis_connection import GivenUpError
from cache.tiers.redis_node import FAILURES, Fill, RedisMetrics, RedisNode, kind_of
from cache.tiers.redis_nodes import ClusterNodes, OneNode, create_nodes
from cache.tiers.stats import TierCounters
from services.runtime.errors import UnavailableError
from services.runtime.redis.redis_url import parse_redis_url
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

# 2: frames with a MAC. Older versions of the processes use other names.
_PREFIX = b"rm1:2:"
_REDIRECTS = 2
_CHECK_SECONDS = 5.0
_COMMAND_SECONDS = 1.0


def stored_name(key: bytes) -> bytes:
    return _PREFIX + key


class SharedTier:
    """Entries in Redis under `rm1:2:<key>`, with a TTL of `ttl_seconds` (± 10 %, so that they do not expire together).

    `url` has the format of services/runtime/redis/redis_url.py; raises StartError if it is invalid. `frames`
    authenticates values. `budget_seconds` is the maximum wait of a look-up for one server; then it is a miss.
    """

    def __init__(
        self,
        url: str,
        frames: EntryFrames,
        *,
        ttl_seconds: float,
        budget_seconds: float,
        create_breaker: Callable[[], Breaker],
    ) -> None:
        self.frames = frames
        self.ttl_ms = int(ttl_seconds * 1000)
        self.budget_seconds = budget_seconds
        self._create_breaker = create_breaker
        self._check_task: asyncio.Task[None] | None = None
        self.counters = TierCounters("shared")
        self.metrics = RedisMetrics()
        self.nodes: OneNode | ClusterNodes = create_nodes(parse_redis_url(url, "RINGMESH_REDIS_URL"), self._create_node)

    @property
    def is_skipped(self) -> bool:
        return any(node.breaker.is_open for node in self.nodes.all)

    def start(self) -> None:
        """Connects, reads the slot map of a cluster, and starts the check for servers that will refuse writes."""
        self.nodes.owner(_PREFIX)
        self._check_task = BACKGROUND.start("check of Redis", self._check_memory)

    def get(self, key: bytes) -> Coroutine[Any, Any, Entry | None]:
        """Returns an awaitable for the entry: None on a miss, or if Redis is down, slow, or holds an invalid frame."""
        return self._get(key, None, answer=False)

    def get_answer(
        self, key: bytes, on_reply: Callable[[bool], None] | None = None
    ) -> Coroutine[Any, Any, Entry | None]:
        """Returns the same as `get`, and None if the value is not a serialized ModelInferResponse.

        `on_reply` is called with whether it was a hit, unless Redis gave no answer or an error.
        """
        return self._get(key, on_reply, answer=True)

    async def _get(self, key: bytes, on_reply: Callable[[bool], None] | None, *, answer: bool) -> Entry | None:
        name = stored_name(key)
        node = self.nodes.owner(name)
        if node is None:
            self.counters.failures += 1
            return None
        reply = await node.get(name)
        for _ in range(_REDIRECTS):
            if not isinstance(reply, AskError) or (node := self.nodes.redirected(reply)) is None:
                break
            reply = await node.get(name, asking=type(reply) is AskError)
        entry = self.frames.unpack(key, reply) if isinstance(reply, bytes) else None
        if answer and entry is not None and not is_answer(entry.value):
            entry = None
        if on_reply is not None and not isinstance(reply, Exception):
            on_reply(entry is not None)
        if entry is not None:
            self.counters.hits += 1
            self.counters.saved_compute_us += entry.compute_us
        elif reply is None:
            self.counters.misses += 1
        else:
            if not isinstance(reply, GivenUpError):
                self.metrics.errors.add("damaged" if isinstance(reply, bytes) else kind_of(reply))
            self.counters.failures += 1
        return entry

    def put(self, key: bytes, entry: Entry, ttl_ms: int | None = None) -> None:
        """Writes in the background (write-behind). Drops and counts the entry if Redis is down, refuses or is slow."""
        name = stored_name(key)
        node = self.nodes.owner(name)
        if node is None:
            self.counters.failures += 1
            return
        if ttl_ms is None:
            ttl_ms = int(self.ttl_ms * random.uniform(0.9, 1.1))
        node.put(Fill(name, self.frames.pack(key, entry), ttl_ms))

    async def delete(self, key: bytes) -> None:
        """Deletes the entry. Raises UnavailableError if Redis is unreachable."""
        name = stored_name(key)
        await self.run(name, _COMMAND_SECONDS, "UNLINK", name)

    async def run(self, name: bytes, seconds: float, *command: str | bytes | int) -> Any:
        """Runs any other command on the server that owns `name`, and returns the reply.

        Raises UnavailableError, also after `seconds`; its cause is the error of redis-py.
        """
        node = self.nodes.owner(name)
        cause: Exception = LookupError("the map of the cluster's slots is not known yet")
        for _ in range(_REDIRECTS + 1):
            if node is None:
                break
            try:
                async with asyncio.timeout(seconds):
                    return await node.client.execute_command(*command)  # type: ignore[no-untyped-call]
            except AskError as error:
                cause, node = error, self.nodes.redirected(error)
            except FAILURES as error:
                cause = error
                break
        raise UnavailableError(f"Redis cannot be used: {cause!r}; retry later", kind="redis") from cause

    async def close(self) -> None:
        if self._check_task is not None:
            self._check_task.cancel()
        await self.nodes.close()

    def _create_node(self, name: str, client: Redis, on_failure: Callable[[], None]) -> RedisNode:
        return RedisNode(
            name,
            client,
            budget_seconds=self.budget_seconds,
            breaker=self._create_breaker(),
            on_failure=on_failure,
            on_fill=self._filled,
            metrics=self.metrics,
        )

    def _filled(self, fill: Fill, error: Exception | None) -> None:
        if error is None:
            self.counters.fills += 1
        elif isinstance(error, MovedError) and not fill.moved and (node := self.nodes.redirected(error)) is not None:
            node.put(Fill(fill.name, fill.frame, fill.ttl_ms, moved=True))
        else:
            if not isinstance(error, GivenUpError):
                self.metrics.errors.add(kind_of(error))
            self.counters.failures += 1

    async def _check_memory(self) -> None:
        """Checks the eviction policy of each server once it answers, and reads its eviction count periodically."""
        checked: set[str] = set()
        evicted: dict[str, int] = {}
        while True:
            for node in self.nodes.all:
                if node.name not in checked and await self._check_policy(node):
                    checked.add(node.name)
                with contextlib.suppress(*FAILURES):
                    async with asyncio.timeout(_CHECK_SECONDS):
                        evicted[node.name] = (await node.client.info("stats"))["evicted_keys"]
            self.counters.evictions = sum(evicted.values())
            await asyncio.sleep(_CHECK_SECONDS)

    async def _check_policy(self, node: RedisNode) -> bool:
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                memory = await node.client.info("memory")
        except FAILURES:
            return False
        if memory.get("maxmemory") and memory.get("maxmemory_policy") == "noeviction":
            log.warning(
                "Redis %s has maxmemory-policy noeviction: when its %d bytes are full, it refuses new entries; "
                "set allkeys-lru or allkeys-lfu",
                node.name,
                memory["maxmemory"],
            )
        return True
