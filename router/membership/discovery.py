"""Worker discovery: announcements in Redis, and the addresses of a DNS name."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError
from ringmesh.inference.v1 import inference_pb2

from router.balancing.member import Listing
from router.membership.worker_description import is_text, is_weight
from services.runtime.process.settings import is_host_port
from services.runtime.redis.discovery import ADDRESSES, CHANGE_SECONDS, FAILURES, TTL_SECONDS, VERSION, AnyRedis, key
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

# Announcements are also read periodically, because they expire without a change of the version.
_READ_SECONDS = TTL_SECONDS / 2
_DNS_SECONDS = 1.0

Report: TypeAlias = Callable[[Iterable[Listing]], None]
# A source of workers: reports all that it lists, and again at each change; runs until it is cancelled.
Watch: TypeAlias = Callable[[Report], Coroutine[Any, Any, None]]


class InvalidListingError(Exception):
    """An invalid entry in a list of workers; it is skipped."""


class AnnouncedWorkers:
    """The workers' announcements in Redis. While Redis is down nothing is reported, and the last report stays valid."""

    def __init__(self, redis: AnyRedis) -> None:
        self._redis = redis

    async def watch(self, report: Report) -> None:
        """Reports all announced workers, and again at each change; runs until it is cancelled."""
        loop = asyncio.get_running_loop()
        seen: bytes | str | None = None
        due = 0.0
        failing = False
        try:
            while True:
                try:
                    version = await self._redis.get(VERSION)
                    if version != seen or loop.time() >= due:
                        report(await self._read())
                        seen, due = version, loop.time() + _READ_SECONDS
                    if failing:
                        log.info("announcements are read again")
                    failing = False
                except FAILURES as error:
                    if not failing:
                        log.warning(
                            "announcements cannot be read, so the last known workers are kept: Redis: %r", error
                        )
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
        listings = [_listing(address, data) for address, data in zip(addresses, found, strict=True) if data is not None]
        return [listing for listing in listings if listing is not None]


async def watch_dns(host: str, port: int, report: Report) -> None:
    """Reports all addresses of a DNS name, such as a headless Kubernetes service, every second until cancelled.

    If resolution fails, nothing is reported.
    """
    failing = False
    while True:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
            )
            hosts = [f"[{address[0]}]" if family == socket.AF_INET6 else address[0] for family, *_, address in found]
            report(Listing(f"{each}:{port}") for each in hosts)
            failing = False
        except OSError as error:
            if not failing:
                log.warning("%s cannot be resolved, so the last known workers are kept: %s", host, error)
            failing = True
        await asyncio.sleep(_DNS_SECONDS)


def _address(member: object) -> str:
    """The address from a member of the Redis set; "" if it is invalid, which is counted as a failure."""
    # The client returns bytes.
    try:
        address = bytes(member).decode() if isinstance(member, (bytes, bytearray)) else ""
    except UnicodeDecodeError:
        address = ""
    if not (is_host_port(address) and is_text(address)):
        _skipped(f"{member!r:.80} is listed, and is no host:port")
        return ""
    return address


def _listing(address: str, data: object) -> Listing | None:
    """The announcement of the worker at `address`; None if it is invalid, which is counted as a failure."""
    try:
        announcement = inference_pb2.Announcement.FromString(data if isinstance(data, bytes) else b"")
    except DecodeError:
        announcement = inference_pb2.Announcement()
    if announcement.address != address or not is_weight(announcement.weight):
        _skipped(f"what {address} announces is no announcement of it: {data!r:.80}")
        return None
    names = (announcement.worker_id, announcement.region, announcement.zone)
    if not all(map(is_text, names)):
        _skipped(f"{address} announces an id, region or zone that is no text: {names!r:.240}")
        return None
    digests = frozenset(model.digest for model in announcement.models)
    return Listing(address, *names, announcement.weight, announcement.accepting, digests)


def _skipped(reason: str) -> None:
    BACKGROUND.failed("discovery", InvalidListingError(reason))
