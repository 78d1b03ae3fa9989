"""Who calls in a soak with identity: tenants with API keys over mutual TLS, both replaced all the while."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from pathlib import Path

import grpc
import ringmesh

from services.cli.commands import keys
from tests.certificates import Ca, Issued, replace
from tests.soak.faults import STOPPED_SECONDS
from tests.soak.traffic import DEADLINE_SECONDS, OWN_CONNECTION, Metadata

TENANTS = ("acme", "globex", "initech", "umbrella")
# A changed file applies within two seconds (docs/operations.md) of a process that runs.
APPLIED_SECONDS = 2.0 + STOPPED_SECONDS
# Calls with what is replaced may be under way for as long.
_OVERLAP_SECONDS = DEADLINE_SECONDS + 5.0
_PERIOD_SECONDS = 60.0
# Each third certificate is of another CA.
_OF_A_CA = 3
_HOST = "127.0.0.1"


class Identity:
    """Keys and certificates in `folder`, as they are now. `target`: host:port of the TLS edge, set once it is known."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.target = ""
        self.generation = 0
        # While the edge is down, there is no other to retry at.
        self.waits = True
        self.rotations: Counter[str] = Counter()
        self._folder = folder
        self._key_file = folder / "keys.jsonl"
        self._number, self._turn = itertools.count(), itertools.count()
        self._keys = self._new_keys()
        # A key whose line was removed, and when.
        self.revoked: tuple[str, float] | None = None
        self._ca = Ca()
        self._trust(self._ca)
        self._certify()
        # A certificate of a CA that was removed, and when.
        self.retired: tuple[Issued, float] | None = None

    def arguments(self) -> list[str]:
        """Of `ringmesh up`."""
        files = {"certificate": "server.pem", "key": "server-key.pem", "client-ca": "ca.pem"}
        return ["--tls", *(f"--tls-{option}={self._folder / name}" for option, name in files.items())]

    def settings(self) -> dict[str, str]:
        return {"api_keys": str(self._key_file)}

    def metadata(self, tenant: int | None) -> Metadata:
        """With the key of a tenant, by its number; None: of each in turn."""
        number = tenant if tenant is not None else next(self._turn)
        return bearer(self._keys[TENANTS[number % len(TENANTS)]])

    def channel(self, *, retries: bool = False, client: Issued | None = None) -> grpc.aio.Channel:
        """`client`: the caller's certificate; without, the current one."""
        return self._channel(client or self._client, retries=retries)

    def anonymous_channel(self) -> grpc.aio.Channel:
        """Without a certificate of the caller."""
        return self._channel(None, retries=False)

    async def rotate_keys(self) -> None:
        """Until cancelled: new keys beside the old ones, callers use them, the old ones are removed."""
        while True:
            began = time.monotonic()
            before, old = self._key_file.read_bytes(), self._keys
            new = self._new_keys()
            await asyncio.sleep(APPLIED_SECONDS + 4.0)
            self._keys = new
            await asyncio.sleep(_OVERLAP_SECONDS)
            replace(self._key_file, self._key_file.read_bytes().removeprefix(before))
            self.revoked = old[TENANTS[0]], time.monotonic()
            self.rotations["API keys of all tenants"] += 1
            await asyncio.sleep(began + _PERIOD_SECONDS - time.monotonic())

    async def rotate_certificates(self) -> None:
        """Until cancelled: certificates of edge and callers; with a new CA, both are trusted for a while."""
        for number in itertools.count():
            began = time.monotonic()
            if number % _OF_A_CA:
                self._certify()
                self.rotations["certificates of edge and callers"] += 1
                await asyncio.sleep(began + _PERIOD_SECONDS - time.monotonic())
                continue
            before, old, self._ca = self._ca, self._client, Ca()
            self._trust(before, self._ca)
            await asyncio.sleep(_OVERLAP_SECONDS)
            self._certify()
            self.rotations["certificates of edge and callers"] += 1
            await asyncio.sleep(_OVERLAP_SECONDS)
            self._trust(self._ca)
            self.retired = old, time.monotonic()
            self.rotations["CA of edge and callers"] += 1
            await asyncio.sleep(began + _PERIOD_SECONDS - time.monotonic())

    def _channel(self, client: Issued | None, *, retries: bool) -> grpc.aio.Channel:
        pair = (client.key, client.certificate) if client is not None else (None, None)
        options = [*ringmesh.channel_options(retries=retries, authority=_HOST), OWN_CONNECTION]
        return grpc.aio.secure_channel(self.target, grpc.ssl_channel_credentials(self._roots, *pair), options)

    def _new_keys(self) -> dict[str, str]:
        """A key of each tenant, added to the file."""
        number = next(self._number)
        return {
            tenant: keys.create(self._key_file, f"{tenant}-{number}", tenant, ["infer"], [], None) for tenant in TENANTS
        }

    def _trust(self, *authorities: Ca) -> None:
        self._roots = b"".join(ca.pem for ca in authorities)
        replace(self._folder / "ca.pem", self._roots)
        self.generation += 1

    def _certify(self) -> None:
        """Certificates of the current CA."""
        self._ca.issue(_HOST).write(self._folder)
        self._client = self._ca.issue("caller.example.org")
        self.generation += 1


def bearer(key: str) -> Metadata:
    return (("authorization", f"Bearer {key}"),)
