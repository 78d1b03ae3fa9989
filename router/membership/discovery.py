"""Worker discovery: announcements in Redis, and the addresses of a DNS name."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf.message import DecodeError
from ringmesh.inference.v1 import inference_pb2

from router.balancing.member import Listing
from router.membership.worker_description import is_address, is_text, is_weight
from services.runtime.redis.discovery import ADDRESSES, CHANGE_SECONDS, FAILURES, TTL_SECONDS, VERSION, AnyRedis, key
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

# Announcements are also read periodically, because they expire without a change of the version.
_READ_SECONDS = TTL_SECONDS / 2
_DNS_SECONDS = 1.0

Told = Callable[[Iterable[Listing]], None]


class NonsenseError(Exception):
    """An invalid entry in a list of workers; it is skipped."""


class AnnouncedWorkers:
    """The workers' announcements in Redis. While Redis is down nothing is reported, and the last report stays valid."""

    def __init__(self, redis: AnyRedis) -> None:
        self._redis = redis

    async def watch(self, told: Told) -> None:
        """Reports all announced workers to `told`, and again at each change; runs until it is cancelled."""
        loop = asyncio.get_running_loop()
        seen: bytes | str | None = None
        due = 0.0
        failing = False
        try:
            while True:
                try:
                    version = await self._redis.get(VERSION)
                    if version != seen or loop.time() >= due:
                        told(await self._read())
                        seen, due = version, loop.time() + _READ_SECONDS
                    if failing:
                        log.info("announcements are read again")
                    failing = False
                except FAILURES as error:
                    if not failing:
                        log.warning("the fleet stays as it is known: Redis: %r", error)
                    failing = True
                await asyncio.sleep(CHANGE_SECONDS)
        finally:
            await self._redis.aclose()

    async def _read(self) -> list[Listing]:
        members: Any = await self._redis.smembers(ADDRESSES)
        addresses = [address for member in members if (address := _address(member))]
        if not addresses:
            return []
        found: Any = await self._redis.mget([key(address) for address in addresses])
        if gone := [address for address, data in zip(addresses, found, strict=True) if data is None]:
            # A worker that is announcing itself just now does so again within a second.
            await self._redis.srem(ADDRESSES, *gone)
        told = [(address, data) for address, data in zip(addresses, found, strict=True) if data is not None]
        return [listing for address, data in told if (listing := _listing(address, data)) is not None]


class ResolvedWorkers:
    """The addresses of a DNS name, such as a headless Kubernetes service. If resolution fails, nothing is reported."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port

    async def watch(self, told: Told) -> None:
        """Reports all addresses to `told` every second; runs until it is cancelled."""
        failing = False
        while True:
            try:
                found = await asyncio.get_running_loop().getaddrinfo(
                    self._host, self._port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
                )
                told(Listing(_host_port(family, address[0], self._port)) for family, *_, address in found)
                failing = False
            except OSError as error:
                if not failing:
                    log.warning("the workers of %s stay as they are known: DNS: %s", self._host, error)
                failing = True
            await asyncio.sleep(_DNS_SECONDS)


def _host_port(family: int, host: object, port: int) -> str:
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"


def _address(member: object) -> str:
    """The address from a member of the Redis set; "" if it is invalid, which is counted as a failure."""
    # The client returns bytes.
    try:
        address = bytes(member).decode() if isinstance(member, (bytes, bytearray)) else ""
    except UnicodeDecodeError:
        address = ""
    if not is_address(address):
        _skipped(f"{member!r:.80} is listed, and is no host:port")
        return ""
    return address


def _listing(address: str, data: object) -> Listing | None:
    """The announcement of the worker at `address`; None if it is invalid, which is counted as a failure."""
    try:
        told = inference_pb2.Announcement.FromString(data if isinstance(data, bytes) else b"")
    except DecodeError:
        told = inference_pb2.Announcement()
    if told.address != address or not is_weight(told.weight):
        _skipped(f"what {address} announces is no announcement of it: {data!r:.80}")
        return None
    if not all(map(is_text, (told.worker_id, told.region, told.zone))):
        _skipped(f"{address} announces {told.worker_id!r:.80} in {told.region!r:.80}, {told.zone!r:.80}")
        return None
    return Listing(
        address,
        told.worker_id,
        told.region,
        told.zone,
        told.weight,
        told.accepting,
        frozenset(model.digest for model in told.models),
    )


def _skipped(why: str) -> None:
    BACKGROUND.failed("discovery", NonsenseError(why))
