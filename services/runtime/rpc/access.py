"""Who may call which method: by identity, by the network of the caller, or by the credential of Ringmesh's services.

With identities (API keys, client certificates, tokens), each method needs a role of the caller's. Without, callers from
anywhere may infer and read; to operate and to administrate, they must come from one of the admin networks, by default
the local host.

A server on a Unix socket is behind a TLS edge (services/cli/stack/edge.py): it takes the caller's address and
certificate from the metadata that the edge sets. Who calls without that address is a process of the same user.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hmac import compare_digest
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, Final, TypeAlias

import ringmesh
from blake3 import blake3
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from services.runtime.errors import PermissionDeniedError, RingmeshError, UnauthenticatedError
from services.runtime.rpc import client_certificate
from services.runtime.rpc.api_keys import ApiKeys
from services.runtime.rpc.audit_log import UNKNOWN, AuditLog, summary
from services.runtime.rpc.backlog import parse_peer
from services.runtime.rpc.calls import observed
from services.runtime.rpc.client_certificate import CLIENT_CERTIFICATE
from services.runtime.rpc.identity import Identity
from services.runtime.rpc.roles import INFERENCES, OF_A_MODEL, V2, Role, role_of
from services.runtime.rpc.rpc import Context, Handler, Metadata, Service, abort, metadata, parse
from services.runtime.rpc.tokens import Tokens

Network: TypeAlias = IPv4Network | IPv6Network
# Checks the metadata, the peer and the message of a call. Returns who calls, as in the audit log. Raises
# UnauthenticatedError or PermissionDeniedError.
Guard: TypeAlias = Callable[[Metadata, str, bytes], str]
# Metadata with an API key, and with the credential of calls between services.
AUTHORIZATION: Final = "authorization"
CREDENTIAL: Final = "ringmesh-credential"
# Metadata with the caller's address, host:port, which a TLS edge sets.
PEER: Final = "ringmesh-peer"
LOOPBACK: Final = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
_LOCAL, _SERVICE = "local", "service"
_DOTS = 2
_FORWARDED = ("x-forwarded-", "forwarded", "x-real-ip", "via")
# Names of callers are remembered; there are as many as connections.
_MOST_PEERS = 4096


def warning(address: str, *, has_keys: bool) -> str:
    """Returns a warning if other hosts reach `address` (host:port) without API keys; "" otherwise."""
    if has_keys or is_local(address):
        return ""
    return (
        f"{address} is open to other hosts without API keys: anybody who reaches it may run inferences, use the cache "
        "service, and read models, statistics, metrics and traces; RINGMESH_API_KEYS closes it"
    )


def credential_of(secret: str | None) -> str:
    """The credential of all services that have this key secret; "" if there is none."""
    return blake3(secret.encode(), derive_key_context="ringmesh 2026 service calls").hexdigest() if secret else ""


class Access:
    """Decides whether calls to a server at `address`, host:port, are admitted."""

    def __init__(
        self,
        address: str,
        networks: Sequence[Network] = LOOPBACK,
        credential: str = "",
        keys: ApiKeys | None = None,
        audit: AuditLog | None = None,
        tokens: Tokens | None = None,
        *,
        verifies_certificates: bool = False,
        services: frozenset[str] = frozenset(),
    ) -> None:
        """`networks`: the admin networks. `credential`: of the services of this fleet; "": they have none. `keys`
        and `tokens`: None and None: callers have no identity. `audit`: the audit log; None: entries go to the process
        log. `verifies_certificates`: the server verifies client certificates itself. `services`: names in the
        certificates of the services of this fleet."""
        self.audit = audit or AuditLog("", None)
        self._networks = networks
        self._credential = credential.encode()
        self._is_local = is_local(address)
        self._is_behind_edge = address.startswith("unix:")
        self._services = services
        self._has_certificates = self._is_behind_edge or verifies_certificates
        self.warning = warning(address, has_keys=keys is not None or tokens is not None)
        self._peers: dict[str, bool] = {}
        self._keys = keys
        self._tokens = tokens
        # Whether callers need an identity.
        self.is_closed = keys is not None or tokens is not None

    async def follow(self) -> None:
        """Applies changes of keys and tokens."""
        await asyncio.gather(*(each.follow() for each in (self._keys, self._tokens) if each is not None))

    def caller(self, authorization: str, credential: str, tenant: str, certificate: str = "") -> Identity | None:
        """The identity of a caller who wants an inference as `tenant`. Whoever knows the model checks that too.

        None if callers have no identity, or if the caller is a service of this fleet. Raises UnauthenticatedError, and
        PermissionDeniedError if the identity may not do that.
        """
        if not self.is_closed or (credential and self._is_credential(credential)) or self._is_certified(certificate):
            return None
        identity = self.identity(authorization, certificate)
        identity.check_role(Role.INFER)
        if tenant:
            identity.check_tenant(tenant)
        return identity

    def guard(self, method: str) -> Guard | None:
        """Returns the check of the calls of a method; None if none is needed. Inferences are checked by `caller`."""
        role = role_of(method)
        if role is None or method in INFERENCES or (not self.is_closed and role in (Role.INFER, Role.READ)):
            return None
        request = _request_type(method)

        def who(metadata: Metadata, peer: str, data: bytes) -> str:
            if not self.is_closed and self.is_near(peer) and not self._is_forwarded(metadata):
                return _LOCAL
            if self.is_service(metadata):
                return _SERVICE
            if not self.is_closed:
                raise PermissionDeniedError(
                    f"{method} is for callers on this host, not at {peer}; name their networks in "
                    "RINGMESH_ADMIN_NETWORKS, or give services the same RINGMESH_KEY_SECRET"
                )
            identity = self.identity(_value(metadata, AUTHORIZATION), _value(metadata, CLIENT_CERTIFICATE))
            identity.check_role(role)
            if identity.tenant or identity.models:
                _check_scope(identity, method, parse(request, data) if request is not None else None)
            return str(identity)

        def check(metadata: Metadata, peer: str, data: bytes) -> str:
            peer = self.peer(metadata, peer)
            try:
                return who(metadata, peer, data)
            except RingmeshError as error:
                # Not verified again if it was wrong: that costs more than the rest of a refusal.
                holder = UNKNOWN if isinstance(error, UnauthenticatedError) else self._holder(metadata)
                self.audit.refused(method, peer, error.code.name, error.message, holder)
                raise

        return check

    def protect(self, service: Service) -> Service:
        """Returns `service` with its handlers protected; the engine protects its fast paths by `guard`."""
        handlers = {name: self.guarded(f"{service.name}/{name}", made) for name, made in service.handlers.items()}
        return replace(service, handlers=handlers)

    def guarded(self, method: str, handler: Handler) -> Handler:
        guard = self.guard(method)
        if guard is None:
            return handler

        async def check(request: Any, context: Context) -> str:
            data = request if isinstance(request, bytes) else b""
            try:
                return guard(metadata(context), context.peer(), data)
            except RingmeshError as error:
                await abort(context, error)

        def audit(who: str | None, request: Any, context: Context, result: str) -> None:
            if who is not None and _is_audited(method, who):
                peer = self.peer(metadata(context), context.peer())
                self.audit.write(who, method, peer, result, request=_about(method, request))

        return observed(handler, check, audit)

    def identity(self, authorization: str, certificate: str = "") -> Identity:
        """Whose key, token or certificate this is. Raises UnauthenticatedError."""
        keys, tokens = self._keys, self._tokens
        if keys is not None and certificate and not authorization and self._has_certificates:
            return keys.certified(certificate)
        # A JWT has two dots, and an API key has none.
        if tokens is not None and (keys is None or authorization.count(".") == _DOTS):
            return tokens.identity(authorization)
        assert keys is not None
        return keys.identity(authorization)

    def _holder(self, metadata: Metadata) -> str:
        """Whose key, token or certificate a refused call has, as in the audit log."""
        if not self.is_closed:
            return UNKNOWN
        try:
            return str(self.identity(_value(metadata, AUTHORIZATION), _value(metadata, CLIENT_CERTIFICATE)))
        except RingmeshError:
            return UNKNOWN

    def peer(self, metadata: Metadata, peer: str) -> str:
        """Returns who called the TLS edge, if this server is behind one; else `peer`, who called the server."""
        caller = _value(metadata, PEER) if self._is_behind_edge else ""
        return f"{'ipv6' if caller.startswith('[') else 'ipv4'}:{caller}" if caller else peer

    def _is_forwarded(self, metadata: Metadata) -> bool:
        """Whether a proxy sent the call, so that the peer is not who calls. Envoy always says so; our edge does not."""
        own = CLIENT_CERTIFICATE if self._has_certificates else ""
        return any(name.startswith(_FORWARDED) and name != own for name, _ in metadata)

    def is_near(self, peer: str) -> bool:
        """Whether the caller is in an admin network. One without an address (`unix:`) is on this host, if the server
        listens for this host only."""
        near = self._peers.get(peer)
        if near is None:
            is_nameless = peer.startswith("unix:")
            near = (self._is_local or not is_nameless) and self.is_admin_host(
                "127.0.0.1" if is_nameless else parse_peer(peer)[0]
            )
            if len(self._peers) >= _MOST_PEERS:
                self._peers.clear()
            self._peers[peer] = near
        return near

    def is_admin_host(self, host: str) -> bool:
        """Whether an IP address is in an admin network."""
        return _is_in(host, self._networks)

    def is_service(self, metadata: Metadata) -> bool:
        """Whether the call comes from a service with the same key secret, or with the certificate of one."""
        return self._is_credential(_value(metadata, CREDENTIAL)) or self._is_certified(
            _value(metadata, CLIENT_CERTIFICATE)
        )

    def _is_credential(self, given: str) -> bool:
        return bool(self._credential) and compare_digest(given.encode(), self._credential)

    def _is_certified(self, certificate: str) -> bool:
        if not self._services or not certificate or not self._has_certificates:
            return False
        return not self._services.isdisjoint(client_certificate.names(certificate))


def _is_audited(method: str, who: str) -> bool:
    """Whether a call is an action of an operator. Services' own calls are not; an action that they forward is."""
    if method.startswith("grpc.reflection."):  # tools such as grpcurl make one before each call
        return False
    role = role_of(method)
    return role is Role.OPERATE or (role is Role.ADMIN and who not in (_LOCAL, _SERVICE))


def _value(metadata: Metadata, name: str) -> str:
    """The first value of this name; "" if there is none."""
    return next((str(value) for each, value in metadata if each == name), "")


def _check_scope(identity: Identity, method: str, request: Message | None) -> None:
    """Checks an identity that is limited to a tenant or to models: it may call only what names one of them."""
    fields = request.DESCRIPTOR.fields_by_name if request is not None else {}
    if identity.models:
        name = "model_name" if "model_name" in fields else "name"
        identity.check_model(getattr(request, name) if method in OF_A_MODEL else "")
    if identity.tenant and not method.startswith(f"{V2}/"):
        identity.check_tenant(getattr(request, "tenant", ""))


def _request_type(method: str) -> type[Message] | None:
    """The type of the requests of one of Ringmesh's own methods."""
    service, _, name = method.partition("/")
    try:
        found = ringmesh.POOL.FindServiceByName(service).methods_by_name[name].input_type
    except KeyError:
        return None
    return GetMessageClass(found)


def _about(method: str, data: Any) -> Mapping[str, Any]:
    kind = _request_type(method)
    try:
        return summary(kind.FromString(data)) if kind is not None else {}
    except DecodeError:
        return {}


def is_local(address: str) -> bool:
    """Whether only this host reaches an address, host:port or unix:/path."""
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "unix") or _is_in(host, LOOPBACK)


def _is_in(host: str, networks: Sequence[Network]) -> bool:
    try:
        address = ip_address(host.removeprefix("::ffff:"))
    except ValueError:
        return False
    return any(address in network for network in networks)
