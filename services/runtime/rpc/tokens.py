"""Tokens of callers: JWT, verified with the keys of a JWKS (RFC 7517), a file or an https URL.

The claims `sub`, `exp`, `iss` and `aud` are required. `tenant`, `roles` and `models` are as for API keys, with a prefix
if the issuer needs one; roles of other applications are ignored. A change of the file applies within two seconds. A URL
is read every minute, and earlier if a token names a key that is not known. A JWKS that cannot be read changes nothing,
and the log says so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from services.runtime.errors import UnauthenticatedError, UnavailableError
from services.runtime.file_stamp import stamp
from services.runtime.rpc.api_keys import Grant, field_and_fault
from services.runtime.rpc.identity import Identity, bearer
from services.runtime.rpc.roles import Role

log = logging.getLogger(__name__)

# Signatures by public keys only: with HS256, whoever has a public key could sign.
_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
_POLL_SECONDS = 0.5
_URL_SECONDS, _EARLIEST_SECONDS = 60.0, 5.0
_FETCH_SECONDS = 10.0
_LARGEST = 1 << 20
_MOST_TOKENS = 4096


class KeySetError(Exception):
    """The JWKS cannot be used; the message says why."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Leaves the answer as it is: an error."""


class Tokens:
    """Verifies tokens of one issuer for one audience. `skew`: by how many seconds clocks may differ."""

    def __init__(self, keys: str, issuer: str, audience: str, skew: float, prefix: str = "") -> None:
        """`keys`: path or https URL. A file is read now, a URL by `follow`. Raises KeySetError."""
        try:
            import jwt  # noqa: F401  # here, so that no request waits for it
        except ImportError:
            raise KeySetError("PyJWT is not installed: pip install 'ringmesh-server[jwt]'") from None
        self._source = keys
        self._issuer, self._audience, self._skew, self._prefix = issuer, audience, skew, prefix
        self._path = None if keys.startswith("https://") else Path(keys)
        self._seen = stamp([] if self._path is None else [self._path])
        if self._path is None:
            self._read: Callable[[], bytes] = self._fetch
        elif "://" in keys:
            raise KeySetError(f"{keys} must be a path or an https URL")
        else:
            self._read = self._path.read_bytes
        self._keys: Mapping[str | None, Any] = self._load() if self._path is not None else {}
        self._is_missing_key = self._path is None
        # By the value of the metadata, for valid tokens.
        self._known: dict[str, Identity] = {}

    def identity(self, authorization: str) -> Identity:
        """The holder of a token, from the metadata `authorization`.

        Raises UnauthenticatedError, and UnavailableError before the keys are there.
        """
        known = self._known
        identity = known.get(authorization)
        if identity is None:
            identity = self._verify(bearer(authorization, "a token"))
            if len(known) >= _MOST_TOKENS:
                known.clear()
            known[authorization] = identity
        elif identity.expires <= time.time():
            raise UnauthenticatedError("the token is refused: it has expired")
        return identity

    def _verify(self, token: str) -> Identity:
        import jwt

        try:
            header = jwt.get_unverified_header(token)
            if "crit" in header:
                raise UnauthenticatedError(
                    "the token is refused: its header has `crit`, of which nothing is known here"
                )
            key = self._key(header.get("kid"))
            claims = jwt.decode(
                token,
                key,
                _ALGORITHMS,
                {"require": ["exp", "sub"], "enforce_minimum_key_length": True},
                issuer=self._issuer,
                audience=self._audience,
                leeway=self._skew,
            )
            return self._identity(claims)
        except ValidationError as error:
            claim, message = field_and_fault(error.errors()[0])
            raise UnauthenticatedError(f"the token is refused: {claim or 'its claims'}: {message}") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise UnauthenticatedError(f"the token is refused: {error}") from None

    def _key(self, kid: object) -> Any:
        if not self._keys:
            raise UnavailableError(f"the keys of tokens cannot be read from {self._source} yet")
        key = self._keys.get(kid) if kid is None or isinstance(kid, str) else None
        if key is None:
            self._is_missing_key = True
            raise UnauthenticatedError(f"the token is refused: its key {kid!r} is not known")
        return key

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        given = claims.get(f"{self._prefix}roles", [])
        roles = given.split() if isinstance(given, str) else given
        grant = Grant(
            id=claims["sub"],
            tenant=claims.get(f"{self._prefix}tenant", ""),
            roles=[role for role in Role if role in roles],
            models=claims.get(f"{self._prefix}models", []),
        )
        expires = float(claims["exp"]) + self._skew
        return Identity(grant.id, grant.tenant, frozenset(grant.roles), frozenset(grant.models), expires, "token")

    async def follow(self) -> None:
        """Reads the keys again when the file changes, or from the URL."""
        read_at = -_URL_SECONDS
        while True:
            now = time.monotonic()
            if self._path is not None:
                before, self._seen = self._seen, await asyncio.to_thread(stamp, [self._path])
                is_due = self._seen != before
            else:
                is_due = now - read_at >= (_EARLIEST_SECONDS if self._is_missing_key else _URL_SECONDS)
            if is_due:
                read_at, self._is_missing_key = now, False
                try:
                    self._keys = await asyncio.to_thread(self._load)
                    self._known = {}
                except KeySetError as error:
                    log.error("the keys of tokens stay as they were: %s", error)
            await asyncio.sleep(_POLL_SECONDS)

    def _load(self) -> dict[str | None, Any]:
        """The public keys by id; None: of a key without one."""
        try:
            document = json.loads(self._read())
        except (OSError, HTTPException, ValueError, RecursionError) as error:
            raise KeySetError(f"cannot read a JWKS from {self._source}: {error}") from None
        given = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(given, list):
            raise KeySetError(f"cannot read a JWKS from {self._source}: it has no list `keys`")
        keys = {key.key_id: key for one in given if (key := _public_key(one)) is not None}
        if not keys:
            raise KeySetError(f"{self._source} has no public key to verify signatures")
        return keys

    def _fetch(self) -> bytes:
        opener = urllib.request.build_opener(_NoRedirects)
        with opener.open(self._source, timeout=_FETCH_SECONDS) as response:
            body: bytes = response.read(_LARGEST)
        return body


def _public_key(entry: Any) -> Any:
    """A key to verify signatures; None for others, and for malformed ones, which RFC 7517 says to ignore."""
    import jwt

    try:
        key = jwt.PyJWK(entry)
    except (jwt.PyJWTError, AttributeError, LookupError, TypeError, NotImplementedError):  # PyJWT raises all of these
        return None
    is_named = key.key_id is None or isinstance(key.key_id, str)
    return key if is_named and key.key_type != "oct" and key.public_key_use != "enc" else None
