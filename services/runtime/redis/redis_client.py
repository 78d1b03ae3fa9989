"""redis-py clients for a Redis URL. They do not retry automatically, because retries would delay callers."""

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
    """Returns the options of every connection.

    Maintenance notifications are disabled: with them, redis-py keeps a connection that has received an unrequested
    message, and from then on matches every reply to the wrong command.
    """
    return {
        "protocol": 3,
        "socket_connect_timeout": connect_seconds,
        "retry": Retry(NoBackoff(), 0),
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }


def one_server(settings: Mapping[str, Any]) -> Redis:
    """Returns a client of one server; the connection settings name its `host` and `port`, or its `path`."""
    return Redis.from_pool(ConnectionPool(**settings))


def server(url: RedisUrl, common: Mapping[str, Any]) -> Redis:
    """Returns a client of one server, or of the primary, which Sentinels name for each connection; not of a cluster."""
    if url.topology is Topology.SENTINEL:
        plain = {name: value for name, value in url.options.items() if name != "connection_class"}
        servers = {**plain, **common, **({"ssl": True} if url.is_secure else {})}
        secure = {name: value for name, value in servers.items() if name.startswith("ssl")}
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            list(url.hosts),
            sentinel_kwargs={**common, **secure, "socket_timeout": _SENTINEL_SECONDS, **url.sentinel_options},
        )
        primary: Redis = sentinel.master_for(url.service, **servers)
        return primary
    host = {"host": url.hosts[0][0], "port": url.hosts[0][1]} if url.hosts else {}
    return one_server({**url.options, **host, **common})


def cluster(url: RedisUrl, common: Mapping[str, Any]) -> RedisCluster:
    """Returns a client of the cluster that the hosts belong to; if a server fails, it reads the slots again."""
    plain = {name: value for name, value in url.options.items() if name != "connection_class"}
    return RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in url.hosts], ssl=url.is_secure, **{**plain, **common}
    )


@asynccontextmanager
async def lent_connection(client: Redis, protocol: asyncio.Protocol) -> AsyncIterator[asyncio.Transport]:
    """Opens a connection with the settings of `client`, outside its pool, and switches it to `protocol`.

    `connection_made` is not called. Raises redis-py's errors if it cannot connect.
    """
    connection = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    try:
        await connection.connect()
        # redis-py has no public name for the transport; tests/system/test_redis_topologies.py would detect a change.
        transport: asyncio.Transport = connection._writer.transport
        transport.set_protocol(protocol)
        yield transport
    finally:
        await connection.disconnect(nowait=True)
