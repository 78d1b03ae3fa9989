"""redis-py's client of what a URL names. It does not retry by itself: that takes the time of callers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from services.runtime.redis.redis_url import RedisUrl, Topology

_SENTINEL_SECONDS = 0.5


def options(connect_seconds: float) -> dict[str, Any]:
    """Of every connection.

    With notifications of maintenance, redis-py keeps a connection on which more was said than was asked, and then
    takes every reply for that of a later command, for good.
    """
    return {
        "protocol": 3,
        "socket_connect_timeout": connect_seconds,
        "retry": Retry(NoBackoff(), 0),
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }


def one_server(settings: Mapping[str, Any]) -> Redis:
    """The server at `host` and `port`, or `path`, of these settings of a connection."""
    return Redis.from_pool(ConnectionPool(**settings))


def server(url: RedisUrl, more: Mapping[str, Any]) -> Redis:
    """The one server, or the primary that Sentinels name whenever a connection is made; not of a cluster."""
    if url.topology is Topology.SENTINEL:
        plain = {name: value for name, value in url.options.items() if name != "connection_class"}
        servers = {**plain, **more, **({"ssl": True} if url.is_secure else {})}
        secure = {name: value for name, value in servers.items() if name.startswith("ssl")}
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            list(url.hosts),
            sentinel_kwargs={**more, **secure, "socket_timeout": _SENTINEL_SECONDS, **url.sentinel_options},
        )
        primary: Redis = sentinel.master_for(url.service, **servers)
        return primary
    host = {"host": url.hosts[0][0], "port": url.hosts[0][1]} if url.hosts else {}
    return one_server({**url.options, **host, **more})


def cluster(url: RedisUrl, more: Mapping[str, Any]) -> RedisCluster:
    """All servers of the cluster that the hosts belong to; it is asked again for its slots where one fails."""
    plain = {name: value for name, value in url.options.items() if name != "connection_class"}
    return RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in url.hosts], ssl=url.is_secure, **{**plain, **more}
    )


@asynccontextmanager
async def lent_connection(client: Redis, protocol: asyncio.Protocol) -> AsyncIterator[asyncio.Transport]:
    """A connection of its own, opened as `client` opens those that it keeps; from then on `protocol` hears of it.

    `connection_made` is not called. Raises what redis-py raises where it cannot connect.
    """
    connection = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    try:
        await connection.connect()
        # redis-py has no public name for it; tests/system/test_redis_topologies.py would notice a change.
        transport: asyncio.Transport = connection._writer.transport
        transport.set_protocol(protocol)
        yield transport
    finally:
        await connection.disconnect(nowait=True)
