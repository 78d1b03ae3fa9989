"""Finds the model and the hash of a request; together they make its cache key."""

from __future__ import annotations  # compiled by mypyc

import os
from collections.abc import Iterator

from blake3 import blake3

from cache.keys.epochs import Epochs
from cache.keys.invalidation import InvalidationLog
from cache.keys.keys import RequestHasher, UncacheableError
from cache.policy.cache_control import parse_cache_control
from router.admission.caller import caller_of
from router.balancing.catalog import Catalog, ModelEntry
from router.dispatch.attempts import Workers
from router.request.audit import Audit
from router.request.call import Call
from services.runtime.errors import FailedPreconditionError
from services.runtime.oip import protocol
from services.runtime.oip.infer_request import RequestReader
from services.runtime.oip.request_check import check_request
from services.runtime.rpc.roles import Role
from services.runtime.telemetry.metrics import Sample
from services.runtime.telemetry.recent import Recent, forgotten

# Parsed requests kept in the memo, at about 300 bytes each.
_REMEMBERED = 32_768
# Above this size, hashing dominates the cost of a request, and the memo would hash it a second time.
_LARGEST_BYTES = 32 << 10


class Keyer:
    """Parses, checks and hashes requests for the models of `fleet`. Skips this for requests that are in its memo.

    The memo maps the bytes of requests that were hits to their parsed form.
    """

    def __init__(self, fleet: Workers, purges: InvalidationLog, hasher: RequestHasher, audit: Audit) -> None:
        self._fleet = fleet
        self._purges = purges
        self._hasher = hasher
        self._audit = audit
        self._reader = RequestReader()
        # The hash is keyed, so that nobody can search for two requests with the same digest.
        self._memo_secret = os.urandom(32)
        self._memo: Recent[bytes, _ParsedRequest] = Recent(_REMEMBERED)

    def samples(self) -> Iterator[Sample]:
        yield forgotten("requests", self._memo)

    def admit(self, call: Call) -> None:
        """Applies the caller's metadata and keys the request. Raises RingmeshError."""
        sent = call.caller_metadata
        assert sent is not None
        call.caller = caller_of(sent)
        call.tenant = sent.tenant
        if sent.control:
            call.control = parse_cache_control(sent.control)
        elif len(call.data) <= _LARGEST_BYTES and not self._audit.distrusted:
            memo_key = blake3(call.data, key=self._memo_secret).digest(16)
            if call.tenant:
                memo_key += call.tenant.encode()
            parsed = self._memo.get(memo_key)
            if (
                parsed is not None
                and parsed.catalog is self._fleet.view.catalog
                and parsed.epochs is self._purges.epochs
            ):
                call.model, call.name = parsed.model, parsed.model.name
                call.request_id, call.request_hash = parsed.request_id, parsed.request_hash
                _check_model(call)
                return
            call.memo_key = memo_key
        self.key(call)

    def remember(self, call: Call) -> None:
        """Adds a request to the memo. Only for hits: other requests are rarely sent again."""
        if call.memo_key and call.model is not None:
            catalog, epochs = self._fleet.view.catalog, self._purges.epochs
            parsed = _ParsedRequest(catalog, epochs, call.model, call.request_id, call.request_hash)
            self._memo.put(call.memo_key, parsed)

    def key(self, call: Call) -> None:
        """Parses the request, finds its model, checks it and hashes it. Raises RingmeshError."""
        model = self.describe(call)
        if not model.runnable:
            raise FailedPreconditionError(f"ensemble {model.name!r} cannot run: {model.runnable.reason}")

    def describe(self, call: Call) -> ModelEntry:
        """As `key`, also for an ensemble that cannot run. Returns the model."""
        read = self._reader.read(call.data)
        call.name, call.request_id = read.head.name, read.request_id
        _check_model(call)
        catalog = self._fleet.view.catalog
        call.model = model = catalog.find(call.name, read.head.version, may_read=_may_read(call))
        if read.head.checked is not model:
            check_request(read.head.message, model.name, model.inputs, model.outputs)
            read.head.checked = model
        try:
            verdict = model.cacheable
            if verdict and self._audit.distrusted:
                verdict = self._audit.may_cache(model, catalog)
            if not verdict:
                raise UncacheableError(verdict.reason)
            tenant = call.tenant if model.tenant_scoped else None
            call.request_hash = self._hasher.hash_read(read, model.outputs, tenant)
        except UncacheableError as why:
            if sequence := protocol.sequence_of(read.head.message):
                call.ring_hash = self._hasher.sequence_ring_hash(call.name, sequence)
            call.reason = str(why)
        return model


def _check_model(call: Call) -> None:
    if call.caller_metadata is not None and call.caller_metadata.identity is not None:
        call.caller_metadata.identity.check_model(call.name)


def _may_read(call: Call) -> bool:
    sent = call.caller_metadata
    return sent is not None and (sent.identity is None or sent.identity.has(Role.READ))


class _ParsedRequest:
    """A parsed request; valid for one catalog and one set of invalidation epochs."""

    def __init__(
        self, catalog: Catalog, epochs: Epochs, model: ModelEntry, request_id: str, request_hash: bytes
    ) -> None:
        self.catalog = catalog
        self.epochs = epochs
        self.model = model
        self.request_id = request_id
        self.request_hash = request_hash
