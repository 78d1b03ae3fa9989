"""Questions to running processes: does it serve, who is in the ring, is Redis there."""

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
# A proxy has no business on the loopback address, and another probe's back-off is not ours.
LOCAL = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


async def serves(address: str) -> bool:
    """Whether grpc.health.v1 answers SERVING for the server as a whole."""
    async with grpc.aio.insecure_channel(address, options=LOCAL) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_SECONDS)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def healthy_workers(metrics: str) -> int:
    """How many workers the router whose /metrics that is sends requests to; 0 where it does not answer.

    Of routers that share a port, a call there would ask any.
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
    """Whether a PING is answered; Sentinels and clusters are left to the services. Raises CommandError."""
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
