"""The Redis servers of the shared tier: one server, the primary that Sentinels name, or the primaries of a cluster.

In a cluster each server has its own connections and breaker, so a server that is down affects only its own keys
(redis-py's RedisCluster sends one pipeline to all servers and waits for the slowest). The slot map is refreshed when a
server replies MOVED or fails, and repeatedly while a server is down, until a replica has replaced it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

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


# Creates a node from a name, a client, and a callback for when the breaker opens.
CreateNode = Callable[[str, Redis, Callable[[], None]], RedisNode]


def create_nodes(url: RedisUrl, create: CreateNode) -> OneNode | ClusterNodes:
    """Creates the nodes of `url`. They connect at first use; an unreachable server is not an error here."""
    # Failed servers are skipped, and retried by probes.
    options = redis_client.options(_CONNECT_SECONDS)
    if url.topology is Topology.CLUSTER:
        return ClusterNodes(url, options, create)
    name = f"{url.hosts[0][0]}:{url.hosts[0][1]}" if url.hosts else str(url.options.get("path"))
    return OneNode(create(url.service or name, redis_client.server(url, options), lambda: None))


class OneNode:
    """Holds all names on one server."""

    def __init__(self, node: RedisNode) -> None:
        self._node = node
        self.all = [node]

    def owner(self, name: bytes) -> RedisNode | None:
        return self._node

    def redirected(self, error: AskError) -> RedisNode | None:
        """Returns None. Only a cluster redirects, and the URL of a cluster must start with redis+cluster://."""
        return None

    async def close(self) -> None:
        await self._node.close()


class ClusterNodes:
    """The primaries of a Redis Cluster, by slot."""

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
        return list(self._nodes.values())

    def owner(self, name: bytes) -> RedisNode | None:
        """Returns the primary of the name's slot; None if it is not known (yet)."""
        node = self._slots[key_slot(name)]
        if node is None:
            self._refresh()
        return node

    def redirected(self, error: AskError) -> RedisNode | None:
        """Returns the named server. After a permanent move (MOVED), remembers it and refreshes the slot map."""
        if not error.host:  # the cluster does not report its addresses
            self._refresh()
            return None
        node = self._node(error.host, error.port)
        if isinstance(error, MovedError):
            self._slots[error.slot_id] = node
            self._refresh()
        return node

    async def close(self) -> None:
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
            self._refresh_task = BACKGROUND.once("map of the Redis cluster", self._ask_until_whole)

    async def _ask_until_whole(self) -> None:
        try:
            while not await self._ask() or any(node.breaker.is_open for node in self.all):
                await asyncio.sleep(_REFRESH_PAUSE)
                for node in self.all:
                    node.may_try()  # probes servers that are down, even if no request needs their keys
        finally:
            self._refresh_task = None

    async def _ask(self) -> bool:
        """Reads the slot map from the first node that answers, healthy nodes first. Returns whether it is complete."""
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
            # An empty host means the server that was asked.
            host = (primary[0].decode() if isinstance(primary[0], bytes) else primary[0]) or asked
            slots[first : last + 1] = [self._node(host, primary[1])] * (last - first + 1)
        self._slots = slots
        self._drop_those_without_slots()
        return all(node is not None for node in slots)

    def _drop_those_without_slots(self) -> None:
        used = {id(node) for node in self._slots}
        for address, node in list(self._nodes.items()):
            if id(node) not in used:
                del self._nodes[address]
                closing = BACKGROUND.once("disconnection of a Redis server", node.close)
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
