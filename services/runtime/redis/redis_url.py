"""Parses Redis URLs.

    redis://[user:password@]host[:6379][/db]                        one server
    redis+sentinel://[user:password@]host[:26379][,host...]/service[/db]   the primary that Sentinels name
    redis+cluster://[user:password@]host[:6379][,host...]           a Redis Cluster, by any of its nodes
    unix:///path/to/socket[?db=0]

rediss://, rediss+sentinel:// and rediss+cluster:// use TLS. Options follow `?`: db, client_name, ssl_ca_certs,
ssl_certfile, ssl_keyfile, ssl_cert_reqs (required, optional, none), ssl_check_hostname; and sentinel_username and
sentinel_password for Sentinels with users of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from redis.asyncio.connection import parse_url

from services.runtime.redacted import without_credentials
from services.runtime.rpc.server import StartError

_FILES = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})
_SENTINEL_OPTIONS = {"sentinel_username": "username", "sentinel_password": "password"}
_OPTIONS = _FILES | {"db", "client_name", "ssl_cert_reqs", "ssl_check_hostname", *_SENTINEL_OPTIONS}
_SCHEMES = (
    *("redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"),
    "unix",
)
_EXAMPLES = "redis://host:6379, redis+sentinel://host:26379,host2/service or unix:///path/to/socket"


class Topology(StrEnum):
    """How the servers are arranged and found."""

    NODE = "node"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A parsed URL. `options` are redis-py connection arguments for the servers, without host and port."""

    topology: Topology
    hosts: tuple[tuple[str, int], ...]
    service: str
    options: Mapping[str, Any]
    sentinel_options: Mapping[str, Any]

    @property
    def is_secure(self) -> bool:
        """Whether connections to a cluster or a Sentinel's primary use TLS; for one server, `options` has it."""
        return "connection_class" in self.options and self.topology is not Topology.NODE


def parse_redis_url(url: str, variable: str) -> RedisUrl:
    """Parses the value of `variable`. Raises StartError, which says what is wrong and never shows the password."""
    try:
        return _parse(url)
    except (ValueError, TypeError) as error:
        raise StartError(f"{variable}: {without_credentials(url)!r} is not a Redis URL: {error}") from None


def _parse(url: str) -> RedisUrl:
    split = urlsplit(url)
    scheme, _, kind = split.scheme.partition("+")
    if "@" in url and "@" not in split.netloc:
        raise ValueError("user and password should be percent-encoded")
    topology = Topology(kind) if kind in ("sentinel", "cluster") else Topology.NODE
    if split.scheme not in _SCHEMES or "://" not in url:
        given = f"it begins with {split.scheme + '://'!r}" if "://" in url else "it has no scheme"
        raise ValueError(f"{given}; there are {'://, '.join(_SCHEMES)}://, as in {_EXAMPLES}")
    for name, values in parse_qs(split.query, keep_blank_values=True).items():
        if name not in _OPTIONS:
            raise ValueError(f"it has no option {name!r}; there are {', '.join(sorted(_OPTIONS))}")
        if name in _FILES and not Path(values[-1]).is_file():
            raise ValueError(f"{name}: there is no file {values[-1]!r}")
    credentials, _, addresses = split.netloc.rpartition("@")
    hosts = tuple(_host(address, 26379 if topology is Topology.SENTINEL else 6379) for address in addresses.split(","))
    if topology is Topology.NODE and len(hosts) > 1:
        raise ValueError("it names several hosts; say redis+cluster:// or redis+sentinel://")
    service, path = "", split.path
    if topology is Topology.SENTINEL:
        service, _, db = split.path.strip("/").partition("/")
        if not service:
            raise ValueError("it lacks the service that the Sentinels watch: redis+sentinel://host:26379/service")
        service, path = unquote(service), f"/{db}"
    if topology is Topology.CLUSTER and path.strip("/"):
        raise ValueError("a Redis Cluster has no databases and no services, so nothing stands behind its hosts")
    if path.strip("/") and scheme != "unix" and not path.strip("/").isdecimal():
        raise ValueError(f"{path!r} is not the number of a database")
    plain = f"{scheme}://{credentials + '@' if credentials else ''}host{path}?{split.query}"
    options = dict(parse_url(plain if scheme != "unix" else url))
    options.pop("host", None)
    sentinel_options = {ours: options.pop(name) for name, ours in _SENTINEL_OPTIONS.items() if name in options}
    if sentinel_options and topology is not Topology.SENTINEL:
        raise ValueError("sentinel_username and sentinel_password are for redis+sentinel://")
    return RedisUrl(topology, () if scheme == "unix" else hosts, service, options, sentinel_options)


def _host(address: str, port: int) -> tuple[str, int]:
    split = urlsplit(f"//{address}")
    return split.hostname or "127.0.0.1", split.port if split.port is not None else port
