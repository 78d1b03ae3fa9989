"""Settings of the cache tiers, for routers and the cache service."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from typing import Annotated, ClassVar

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from cache.keys.invalidation import InvalidationLog
from cache.mesh import Mesh
from cache.policy.doorkeeper import Doorkeeper
from cache.policy.refusals import Refusals
from cache.regions.peer_regions import PeerRegion, PeerRegions
from cache.tiers.breaker import Breaker
from cache.tiers.entry import EntryFrames
from cache.tiers.local_tier import LocalTier
from cache.tiers.shared_tier import SharedTier
from services.runtime.process.settings import ServiceSettings, is_host_port
from services.runtime.rpc.access import credential_of
from services.runtime.rpc.server import StartError

log = logging.getLogger(__name__)


class MeshSettings(ServiceSettings):
    """Settings of a process with cache tiers."""

    redis_url: str | None = Field(
        None, description="Redis or Valkey, one or many (services/runtime/redis/redis_url.py); none: local only"
    )
    local_tier_bytes: int = Field(256 << 20, ge=0, description="memory for the local tier, keys and overhead included")
    shared_ttl_seconds: float = Field(7 * 86400, gt=0, description="how long an entry stays in Redis")
    shared_budget_seconds: float = Field(0.05, gt=0, description="longest wait for a look-up in Redis")
    purge_lease_seconds: float = Field(
        30.0,
        ge=5,
        description="maximum age of cached answers while Redis is unreachable; limits the wait of a purge",
    )
    shared_admission: bool = Field(
        False, description="whether only answers that are requested again are written to Redis"
    )
    refusal_seconds: float = Field(
        0.0, ge=0, description="how long an invalid request is refused without asking a worker"
    )
    peer_regions: Annotated[tuple[tuple[str, str], ...], NoDecode] = Field(
        (), description="caches of other regions: region=host:port, separated by commas"
    )

    @field_validator("peer_regions", mode="before")
    @classmethod
    def _split_peers(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(tuple(part.strip().partition("=")[::2]) for part in value.split(",") if part.strip())

    @field_validator("peer_regions")
    @classmethod
    def _check_peers(cls, peers: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        for region, address in peers:
            if not (region and is_host_port(address)):
                raise ValueError(f"{region}={address} is not region=host:port")
        if len({region for region, _ in peers}) != len(peers):
            raise ValueError("a region is named twice")
        return peers

    def secret(self) -> str:
        """Returns the configured secret, or a random one. Raises StartError if processes must share a secret."""
        if self.key_secret is not None:
            return self.key_secret
        if self.redis_url is not None or self.peer_regions:
            raise StartError(
                "RINGMESH_KEY_SECRET is not set. Processes that share RINGMESH_REDIS_URL or RINGMESH_PEER_REGIONS must "
                "have the same secret; generate one with `openssl rand -hex 32` and give it to all of them"
            )
        log.info("RINGMESH_KEY_SECRET is not set: using a random secret, so other routers compute other request hashes")
        return secrets.token_hex(32)

    @property
    def own_address(self) -> str:
        """An address that no other process of this host has."""
        return self.address

    @property
    def member(self) -> str:
        """The name under which this process confirms purges. No other has it; it stays across restarts, except on free
        ports."""
        address = self.own_address if not self.own_address.endswith(":0") else str(os.getpid())
        return f"{self.section} {address} on {socket.gethostname()}"

    def create_mesh(self, secret: str) -> Mesh:
        """Creates the configured tiers, with entries authenticated by `secret`.

        Raises StartError if the Redis URL is invalid, but not if Redis is unreachable.
        """
        shared = None
        frames = EntryFrames(secret)
        if self.redis_url is not None:
            shared = SharedTier(
                self.redis_url,
                frames,
                ttl_seconds=self.shared_ttl_seconds,
                budget_seconds=self.shared_budget_seconds,
                create_breaker=lambda: Breaker(time.monotonic),
            )
        purges = InvalidationLog(shared, self.member, self.purge_lease_seconds)
        credential, tls = credential_of(self.key_secret), self.service_tls()
        peers = [
            PeerRegion(region, peer, Breaker(time.monotonic), frames, credential, tls)
            for region, peer in self.peer_regions
        ]
        return Mesh(
            LocalTier(self.local_tier_bytes),
            shared,
            purges,
            PeerRegions(peers, purges),
            Refusals(self.refusal_seconds),
            Doorkeeper(shared) if self.shared_admission and shared is not None else None,
        )


class CacheSettings(MeshSettings):
    """Settings of the cache service."""

    section: ClassVar[str] = "cache"
    address: str = Field("127.0.0.1:8010", description="host:port to serve gRPC on; port 0 takes a free one")
    peer_bytes_per_second: int = Field(
        1 << 20, ge=0, description="budget for copying the most valuable answers of peer regions; 0: none"
    )
    metrics_address: str = Field("127.0.0.1:8012", description="host:port to serve /metrics on")
