"""The Redis servers that hold the shared tier: one, the primary that Sentinels name, or those of a cluster by slot.

In a cluster each server has look-ups, fills and a breaker of its own, so one that is down costs its keys and no others
(redis-py's RedisCluster sends one pipeline to all, and waits for the slowest). The map of slots is asked for again when
a server says MOVED or fails, and while one stays down, until a replica has taken its place.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any, Protocol

from redis.asyncio import Redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, MovedError

from cache.tiers.redis_node import FAILURES, RedisNode
from services.runtime.redis import redis_client
from services.runtime.redis.redis_url import RedisUrl, Topology
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 1.0
_REFRESH_SECONDS = 1.0
_REFRESH_PAUSE = 0.25


class Nodes(Protocol):
    """Which server holds a name."""

    def owner(self, name: bytes) -> RedisNode | None:
        """None where that is not known (yet)."""

    def redirected(self, error: AskError) -> RedisNode | None:
        """The server that a MOVED or ASK names; a MOVED is remembered."""

    @property
    def all(self) -> list[RedisNode]:
        """Those that are known now."""

    async def close(self) -> None:
        """Writes what is left and disconnects."""


# Makes a node of a name and a client; told whom to call when its breaker opens.
CreateNode = Callable[[str, Redis, Callable[[], None]], RedisNode]


def create_nodes(url: RedisUrl, create: CreateNode) -> Nodes:
    """Connects at first use; an unreachable server is no error here."""
    # What fails is skipped, and retried by probes.
    options = redis_client.options(_CONNECT_SECONDS)
    if url.topology is Topology.CLUSTER:
        return ClusterNodes(url, options, create)
    name = f"{url.hosts[0][0]}:{url.hosts[0][1]}" if url.hosts else str(url.options.get("path"))
    return OneNode(create(url.service or name, redis_client.server(url, options), lambda: None))


class OneNode:
    """All names on one server."""

    def __init__(self, node: RedisNode) -> None:
        self._node = node
        self.all = [node]

    def owner(self, name: bytes) -> RedisNode | None:
        """The server."""
        return self._node

    def redirected(self, error: AskError) -> RedisNode | None:
        """Only a cluster redirects; told to one server, its URL should have said redis+cluster://."""
        return None

    async def close(self) -> None:
        """Writes what is left and disconnects."""
        await self._node.close()


class ClusterNodes:
    """The primaries of a Redis Cluster by slot."""

    def __init__(self, url: RedisUrl, options: dict[str, Any], create: CreateNode) -> None:
        self._options = {**url.options, **options}
        self._create = create
        self._seeds = url.hosts
        self._nodes: dict[tuple[str, int], RedisNode] = {}
        self._slots: list[RedisNode | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._refresh_task: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def all(self) -> list[RedisNode]:
        """The primaries known now."""
        return list(self._nodes.values())

    def owner(self, name: bytes) -> RedisNode | None:
        """The primary of the name's slot."""
        node = self._slots[key_slot(name)]
        if node is None:
            self._refresh()
        return node

    def redirected(self, error: AskError) -> RedisNode | None:
        """The server named; where the slot has moved for good, it is remembered, and the rest of the map asked for."""
        if not error.host:  # the cluster does not tell its addresses
            self._refresh()
            return None
        node = self._node(error.host, error.port)
        if isinstance(error, MovedError):
            self._slots[error.slot_id] = node
            self._refresh()
        return node

    async def close(self) -> None:
        """Writes what is left and disconnects."""
        if self._refresh_task is not None:
            self._refresh_task.cancel()
        await asyncio.gather(*(node.close() for node in self.all), *self._closing)

    def _node(self, host: str, port: int) -> RedisNode:
        node = self._nodes.get((host, port))
        if node is None:
            client = redis_client.one_server({**self._options, "host": host, "port": port})
            node = self._nodes[host, port] = self._create(f"{host}:{port}", client, self._refresh)
        return node

    def _refresh(self) -> None:
        if self._refresh_task is None:
            self._refresh_task = BACKGROUND.once("map of the Redis cluster", self._ask_until_whole())

    async def _ask_until_whole(self) -> None:
        try:
            while not await self._ask() or any(node.breaker.is_open for node in self.all):
                await asyncio.sleep(_REFRESH_PAUSE)
                for node in self.all:
                    node.may_try()  # probes those that are down, also where their keys are not asked for
        finally:
            self._refresh_task = None

    async def _ask(self) -> bool:
        """The map, from the first node that tells it: those that work first."""
        known = sorted(self._nodes.items(), key=lambda item: (item[1].breaker.is_open, random.random()))
        for (host, _), node in known:
            if await self._ask_one(node.client, host):
                return True
        for host, port in self._seeds:
            if (host, port) not in self._nodes:
                client = redis_client.one_server({**self._options, "host": host, "port": port})
                try:
                    if await self._ask_one(client, host):
                        return True
                finally:
                    await client.aclose()
        return False

    async def _ask_one(self, client: Redis, asked: str) -> bool:
        try:
            async with asyncio.timeout(_REFRESH_SECONDS):
                ranges = await client.execute_command("CLUSTER", "SLOTS")  # type: ignore[no-untyped-call]
        except FAILURES as error:
            log.debug("no map of slots from %s: %r", asked, error)
            return False
        slots: list[RedisNode | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, primary, *_ in ranges:
            # An empty host stands for the one that was asked.
            host = (primary[0].decode() if isinstance(primary[0], bytes) else primary[0]) or asked
            slots[first : last + 1] = [self._node(host, primary[1])] * (last - first + 1)
        self._slots = slots
        self._drop_those_without_slots()
        return all(node is not None for node in slots)

    def _drop_those_without_slots(self) -> None:
        used = {id(node) for node in self._slots}
        for place, node in list(self._nodes.items()):
            if id(node) not in used:
                del self._nodes[place]
                closing = BACKGROUND.once("farewell to a Redis server", node.close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
