"""Probes of running processes: whether a server serves, which workers are healthy, whether Redis answers."""

from __future__ import annotations

import asyncio
import re
import urllib.request

import grpc
from redis.asyncio import Redis
from redis.exceptions import RedisError
from ringmesh.health.v1 import health_pb2, health_pb2_grpc

from services.cli.errors import CommandError
from services.runtime.redis.redis_url import Topology, parse_redis_url
from services.runtime.rpc.server import StartError

_SECONDS = 1.0
# No proxy for the loopback address, and no reconnect back-off shared with other probes.
LOCAL = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


async def serves(address: str, service: str = "") -> bool:
    """Whether grpc.health.v1 answers SERVING for the service, "": for the server as a whole. `address`: host:port."""
    # A channel costs much more than a connection that is refused, as most are while processes start.
    if not await listens(address):
        return False
    async with grpc.aio.insecure_channel(address, options=LOCAL) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=_SECONDS)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def listens(address: str) -> bool:
    """Whether a process accepts connections at `address`, host:port."""
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host.strip("[]"), int(port)), _SECONDS)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


async def healthy_workers(metrics: str) -> int:
    """Returns how many workers a router considers healthy, from its /metrics; 0 if it does not answer.

    Uses /metrics because a call to a port that routers share reaches any one of them.
    """
    return await asyncio.to_thread(_healthy_workers, metrics)


def _healthy_workers(metrics: str) -> int:
    try:
        with _OPENER.open(f"http://{metrics}/metrics", timeout=_SECONDS) as response:
            text: str = response.read().decode()
    except (OSError, ValueError):
        return 0
    return len(re.findall(r"^ringmesh_ring_member_healthy\{.*\} 1\b", text, re.MULTILINE))


async def redis_answers(url: str) -> bool:
    """Whether Redis answers a PING. Sentinels and clusters are not checked. Raises CommandError if `url` is invalid."""
    try:
        if parse_redis_url(url, "--redis").topology is not Topology.NODE:
            return True
    except StartError as error:
        raise CommandError(str(error)) from None
    client = Redis.from_url(url, socket_connect_timeout=_SECONDS, socket_timeout=_SECONDS)
    try:
        return bool(await client.ping())
    except (RedisError, OSError, TimeoutError):
        return False
    finally:
        await client.aclose()
