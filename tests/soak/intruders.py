"""Callers of a soak with identity who may not do what they try, and tenants who ask what another tenant asked."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping

import grpc
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from tests.soak.identity import APPLIED_SECONDS, TENANTS, Identity, bearer
from tests.soak.traffic import DEADLINE_SECONDS, INFER, OWN_CONNECTION, TRANSIENT, Call, Callers, Questions

ACROSS = "across tenants"
REVOKED = "revoked key"
_UNKNOWN, _DENIED = frozenset({"UNAUTHENTICATED"}), frozenset({"PERMISSION_DENIED"})
_V2, _CACHE = "/inference.GRPCInferenceService", "/ringmesh.cache.v1.CacheService"
_WORKER = "/ringmesh.inference.v1.InferenceWorkerService"
# Methods that need more than the role infer, by the process that serves them.
_METHODS = {
    "edge": [
        *(f"{_V2}/{name}" for name in ("RepositoryModelLoad", "RepositoryModelUnload", "RepositoryIndex")),
        *(f"{_V2}/{name}" for name in ("LogSettings", "TraceSetting", "SystemSharedMemoryRegister")),
        "/ringmesh.router.v1.RouterService/Explain",
        "/ringmesh.audit.v1.AuditService/List",
    ],
    "cache": [f"{_CACHE}/{name}" for name in ("Purge", "Warm", "Fetch", "ListValuable", "Stats")],
    "worker-0": [f"{_WORKER}/{name}" for name in ("Execute", "Withdraw", "GetDecision", "Describe")],
}
_SECONDS = 2.0
_TLS_ALERT = 0x15


class IdentifiedCallers(Callers):
    """`addresses`: host:port of cache and worker-0, which serve in plain text on this host."""

    def __init__(
        self, identity: Identity, questions: Questions, draw: random.Random, addresses: Mapping[str, str]
    ) -> None:
        super().__init__(identity, questions, draw)
        self.identity = identity
        self._addresses = addresses
        # Of questions that two tenants asked, asked again by one of them: how many, and how many of them were hits.
        self.again, self.hits = 0, 0
        # The longest time for which a revoked key was answered.
        self.revoked_seconds = 0.0

    def kinds(self) -> list[tuple[Call, float]]:
        return [
            *super().kinds(), (self._across, 0.05), (self._impostor, 0.05), (self._admin, 0.05), (self._revoked, 0.05),
            (self._no_certificate, 0.5), (self._removed_ca, 0.5), (self._no_tls, 0.5),
        ]  # fmt: skip

    async def _across(self, channel: grpc.aio.Channel) -> None:
        """Two tenants ask the same, that nobody asked before: one after the other, or at once."""
        # Without retries: an answer to the first attempt would be a hit of the second one.
        question = self._questions.fresh(("mlp", "rows", "add_sub", "pipeline", "scoped"))
        first, second = self._draw.sample(range(len(TENANTS)), 2)
        asked = [self._call(ACROSS, channel, question.of(tenant), may_fail=TRANSIENT) for tenant in (first, second)]
        if self._draw.random() < 0.5:
            outcomes = await asyncio.gather(*asked)
        else:
            outcomes = [await one for one in asked]
        for outcome in outcomes:
            if outcome not in ("miss", "bypass", None):
                self.tallies[ACROSS].wrong += 1
                self.tallies[ACROSS].note("wrong", f"{outcome}: {question.body[:60].hex()}")
        # Else the above would say nothing: the answer is one that may be cached.
        again = await self._call("own again", channel, question.of(first), may_fail=TRANSIENT)
        self.again += again is not None
        self.hits += again is not None and again.startswith("hit-")

    async def _impostor(self, channel: grpc.aio.Channel) -> None:
        """Without a key, with a wrong one, or with one of another tenant. Of what is cached, too."""
        body = self._questions.next().body
        of_acme = self._access.metadata(0)
        kind, metadata, codes = self._draw.choice(
            [
                ("no key", (), _UNKNOWN),
                ("wrong key", bearer("rmk_wrong"), _UNKNOWN),
                ("wrong key", (("ringmesh-credential", "wrong"),), _UNKNOWN),
                ("forged certificate header", (("x-forwarded-client-cert", "Hash=00;URI=spiffe://a/b"),), _UNKNOWN),
                ("forged tenant", (*of_acme, ("ringmesh-tenant", TENANTS[1])), _DENIED),
            ]
        )
        await self.refused(kind, channel, body, metadata, codes)

    async def _admin(self, channel: grpc.aio.Channel) -> None:
        """What the key of a tenant may not do, through the edge and at the other processes."""
        process = self._draw.choice(list(_METHODS))
        method = self._draw.choice(_METHODS[process])
        body = v2.RepositoryModelUnloadRequest(model_name="mlp").SerializeToString() if "Model" in method else b""
        metadata = self._access.metadata(None)
        if process == "edge":
            await self.refused("role of others", channel, body, metadata, _DENIED, method)
            return
        async with grpc.aio.insecure_channel(self._addresses[process], [OWN_CONNECTION]) as other:
            await self.refused("role of others", other, body, metadata, _DENIED, method)

    async def _revoked(self, channel: grpc.aio.Channel) -> None:
        """The key that was revoked last; it may be answered until its revocation applies."""
        if self.identity.revoked is None:
            return
        key, since = self.identity.revoked
        age = time.monotonic() - since
        if age > APPLIED_SECONDS:
            await self.refused(REVOKED, channel, self._questions.next().body, bearer(key), _UNKNOWN)
            return
        try:
            await channel.unary_unary(INFER)(
                self._questions.next().body, timeout=DEADLINE_SECONDS, metadata=bearer(key)
            )
            self.revoked_seconds = max(self.revoked_seconds, age)
        except grpc.aio.AioRpcError:
            pass

    async def _no_certificate(self, _: grpc.aio.Channel) -> None:
        async with self.identity.anonymous_channel() as channel:
            await self._unconnected("no certificate", channel)

    async def _removed_ca(self, _: grpc.aio.Channel) -> None:
        """A certificate of a CA that was removed."""
        if self.identity.retired is None:
            return
        client, since = self.identity.retired
        if time.monotonic() - since > APPLIED_SECONDS:
            async with self.identity.channel(client=client) as channel:
                await self._unconnected("certificate of a removed CA", channel)

    async def _unconnected(self, kind: str, channel: grpc.aio.Channel) -> None:
        tally = self.tallies[kind]
        tally.sent += 1
        try:
            metadata = self._access.metadata(None)
            await channel.unary_unary(INFER)(self._questions.next().body, timeout=_SECONDS, metadata=metadata)
            tally.wrong += 1
            tally.note("OK", "")
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            tally.note(code, str(error.details()))
            tally.answered += code in TRANSIENT
            tally.wrong += code not in TRANSIENT

    async def _no_tls(self, _: grpc.aio.Channel) -> None:
        """Bytes that are no TLS, or a broken beginning of it, at the port of the edge: an alert or nothing is right."""
        tally = self.tallies["no TLS"]
        tally.sent += 1
        host, _, port = self._access.target.rpartition(":")
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
        sent = self._draw.choice(
            [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", hello, hello + self._draw.randbytes(1000)]
        )
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            try:
                got = await asyncio.wait_for(reader.read(100), _SECONDS)
            except TimeoutError:
                got = b""
            writer.close()
        except OSError:
            got = b""  # the edge is down, or has reset the connection
        is_refusal = not got or got[0] == _TLS_ALERT
        tally.answered += is_refusal
        tally.wrong += not is_refusal
        if not is_refusal:
            tally.note("wrong", got.hex())
