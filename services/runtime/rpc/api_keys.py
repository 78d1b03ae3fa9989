"""API keys: a file of JSON lines, each with the hash of a key and what its holder may do.

    {"id": "acme-1", "sha256": "<of the key, in hex>", "tenant": "acme", "roles": ["infer"], "models": ["mlp"],
     "expires": "2027-01-01T00:00:00Z"}

A line may have `certificate` in place of `sha256`: a SPIFFE id or a DNS name in the caller's certificate. `tenant`,
`models` and `expires` may be left out: no tenant, all models, never. A change of the file applies within two seconds. A
file that is invalid or missing changes nothing, and the log says so.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from services.runtime.errors import UnauthenticatedError
from services.runtime.file_stamp import stamp
from services.runtime.rpc import client_certificate
from services.runtime.rpc.identity import Identity, bearer
from services.runtime.rpc.roles import Role

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
# Certificates are remembered; those of workloads change every hour.
_MOST_CERTIFICATES = 4096


class Grant(BaseModel):
    """What the holder of a key, a certificate or a token may do."""

    model_config = ConfigDict(extra="forbid")
    id: str = Field(min_length=1, max_length=256, pattern=r"^[!-~]+$")
    tenant: str = Field("", max_length=256, pattern=r"^([!-~]([ -~]*[!-~])?)?$")
    roles: list[Role]
    models: list[str] = []

    @model_validator(mode="after")
    def _of_the_fleet(self) -> Self:
        if self.tenant and {Role.OPERATE, Role.ADMIN} & {*self.roles}:
            raise ValueError("a key of a tenant may have the roles infer and read; operate and admin are for no tenant")
        return self


class KeyEntry(Grant):
    """One line of the file."""

    sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    certificate: str = Field(default="", max_length=2048, pattern=r"^(spiffe://[A-Za-z0-9._/-]+|[A-Za-z0-9._-]*)$")
    roles: Annotated[list[Role], Field(min_length=1)]
    expires: AwareDatetime | None = None

    @model_validator(mode="after")
    def _check(self) -> KeyEntry:
        if bool(self.sha256) == bool(self.certificate):
            raise ValueError("a line has either sha256 or certificate")
        return self

    def identity(self) -> Identity:
        """What the entry grants."""
        expires = self.expires.timestamp() if self.expires is not None else float("inf")
        kind = "key" if self.sha256 else "certificate"
        return Identity(self.id, self.tenant, frozenset(self.roles), frozenset(self.models), expires, kind)


class KeyFileError(Exception):
    """The file cannot be used; the message names the line and the fault."""


class ApiKeys:
    """The keys in the file at `path`."""

    def __init__(self, path: Path) -> None:
        """Raises KeyFileError."""
        self._path = path
        self._seen = stamp([path])
        # By hash of the key, or by name in the certificate.
        self._entries = _read(path)
        # By the value of the metadata, for valid keys and certificates.
        self._known: dict[str, Identity] = {}
        self._certified: dict[str, Identity] = {}

    def identity(self, authorization: str) -> Identity:
        """The holder of a key, from the metadata `authorization`. Raises UnauthenticatedError."""
        known = self._known  # of the keys as they are now, not as they are read meanwhile
        identity = known.get(authorization)
        if identity is None:
            identity = self._entries.get(hash_of(bearer(authorization, "an API key")))
            if identity is None:
                raise UnauthenticatedError("the API key is unknown or revoked")
            known[authorization] = identity
        return _unexpired(identity)

    def certified(self, certificate: str) -> Identity:
        """The holder of a verified certificate, from its `x-forwarded-client-cert`. Raises UnauthenticatedError."""
        known = self._certified
        identity = known.get(certificate)
        if identity is None:
            names = client_certificate.names(certificate)
            entries = self._entries
            identity = next(filter(None, [entries.get(_certificate(name)) for name in names]), None)
            if identity is None:
                raise UnauthenticatedError(f"no line of the API keys has the certificate of {', '.join(names)}")
            if len(known) >= _MOST_CERTIFICATES:
                known.clear()
            known[certificate] = identity
        return _unexpired(identity)

    async def follow(self) -> None:
        """Applies changes of the file, once it has been the same for one poll."""
        before = self._seen
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            now = await asyncio.to_thread(stamp, [self._path])
            if now == before != self._seen:
                self._seen = now
                try:
                    self._entries = await asyncio.to_thread(_read, self._path)
                    self._known, self._certified = {}, {}
                    log.info("%s has %d keys", self._path, len(self._entries))
                except KeyFileError as error:
                    log.error("the API keys stay as they were: %s", error)
            before = now


def hash_of(key: str) -> str:
    """The hash that the file has of a key. Keys are random, so it needs no salt and no slow hash."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key(
    id: str, tenant: str, roles: list[Role], models: list[str], expires: datetime | None
) -> tuple[str, KeyEntry]:
    """Returns a random key and its line for the file. Raises ValueError."""
    key = f"rmk_{secrets.token_urlsafe(32)}"
    return key, KeyEntry(id=id, sha256=hash_of(key), tenant=tenant, roles=roles, models=models, expires=expires)


def _read(path: Path) -> dict[str, Identity]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"cannot read {path}: {error}") from None
    found: dict[str, Identity] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entry = KeyEntry.model_validate_json(line)
            except ValidationError as error:
                field, message = field_and_fault(error.errors()[0])
                raise KeyFileError(f"{path}, line {number}: {field or 'the line'}: {message}") from None
            found[entry.sha256 or _certificate(entry.certificate)] = entry.identity()
    return found


def ids(path: Path) -> set[str]:
    """Names of the keys and certificates in a file. Raises KeyFileError."""
    return {identity.id for identity in _read(path).values()}


def field_and_fault(error: ErrorDetails) -> tuple[str, str]:
    """The field of one of pydantic's errors, "" if it concerns the whole, and what is wrong with it."""
    return ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")


def _certificate(name: str) -> str:
    """The key of a certificate's name among the entries: never the hash of an API key."""
    return f"certificate {name}"


def _unexpired(identity: Identity) -> Identity:
    if identity.expires <= time.time():
        raise UnauthenticatedError(f"the {identity.kind} {identity.id!r} has expired")
    return identity
