"""Builds the replies to callers, and records them in metrics, traces and the log."""

from __future__ import annotations  # compiled by mypyc

import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TypeAlias

import grpc

from cache.mesh import Found, Mesh
from router.accounting.accounts import Accounts
from router.accounting.meter import CPU, elapsed
from router.accounting.request_metrics import OK, STEP, LabelValues, outcome_of
from router.request.audit import Audit
from router.request.call import Call
from services.runtime import w3c
from services.runtime.errors import RingmeshError
from services.runtime.oip import protocol
from services.runtime.rpc.rpc import Answer, Failure, Metadata, failure
from services.runtime.telemetry.metrics import OTHER
from services.runtime.telemetry.spans import SharedAttributes, Value
from services.runtime.telemetry.tracing import Tracer

# One in _HITS_A_REPORT hits carries the load report: on every hit it would add 5 us each.
_HITS_A_REPORT = 16
_TIERS = {"hit-local": "local", "hit-shared": "shared", "hit-peer": "peer"}
_AUDITED = frozenset({"hit-local", "hit-shared"})


Names: TypeAlias = tuple[tuple[str, str], ...]


class Replies:
    """Makes the answer or failure of each request and counts it. Retains traces that are sampled, slow or failed."""

    def __init__(self, mesh: Mesh, tracer: Tracer, accounts: Accounts, audit: Audit) -> None:
        self._mesh = mesh
        self._tracer = tracer
        self._requests = accounts.requests
        self._log = accounts.log
        self._cost = accounts.cost
        self._report = accounts.load
        self._meter = accounts.meter
        self._audit = audit
        self._hits = 0

    def count(self, call: Call, found: Found) -> Callable[[], None] | None:
        """Counts an answered call. Returns the remaining work, to be called after the answer was sent, if any."""
        model = call.model
        assert model is not None
        labels = (call.method, model.name, model.version, call.tenant, OK, found.outcome)
        end = time.time_ns()
        slow = self._requests.count(labels, elapsed(call.start, end), found.entry.compute_us)
        trace = call.trace
        if self._tracer.ratios:
            self._tracer.sample(trace, model.name)
        if call.method == STEP:
            return call.renew
        keeps = slow or trace.sampled
        if self._meter is not None:
            self._meter.answered(
                labels,
                trace,
                model.worker_type,
                found.entry,
                call.start,
                end,
                call.router_ns,
                len(call.data),
                # An answer that is not cached has no hash; its bytes have, if they are few.
                call.request_hash or call.memo_key,
                alone=keeps,
            )
        audits = found.outcome in _AUDITED and self._audit.takes_hit()
        if keeps or audits:
            return partial(self._afterwards, call, found, labels, end, slow=slow, keeps=keeps, audits=audits)
        return call.renew

    def answer(self, call: Call, found: Found) -> Answer:
        """The answer for the caller. Counts the call."""
        afterwards = self.count(call, found)
        trailing: Metadata = (
            ("ringmesh-cache", found.outcome),
            ("ringmesh-trace-id", call.trace.trace_id),
            ("ringmesh-compute-us", str(found.entry.compute_us)),
        )
        model = call.model
        if (
            model is not None
            and model.freshness is not None
            and model.freshness.is_stale(found.entry.created_at_ms, time.time_ns() // 1_000_000)
        ):
            self._mesh.stale_answers += 1
            trailing = (*trailing, ("ringmesh-stale", "true"))
        if found.similarity:
            trailing = (*trailing, ("ringmesh-similarity", f"{found.similarity:.4f}"))
        if found.rows:
            trailing = (*trailing, ("ringmesh-rows", found.rows))
        if found.worker:
            trailing = (*trailing, ("ringmesh-worker", found.worker), self._report.trailer)
            if call.provider:
                trailing = (*trailing, ("ringmesh-provider", call.provider))
        else:
            self._hits += 1
            if not self._hits % _HITS_A_REPORT:
                trailing = (*trailing, self._report.trailer)
        return protocol.answered(found.entry.value, call.request_id, trailing, afterwards)

    def _afterwards(
        self, call: Call, found: Found, labels: LabelValues, end: int, *, slow: bool, keeps: bool, audits: bool
    ) -> None:
        model = call.model
        assert model is not None
        if call.renew is not None:
            call.renew()
        if audits:
            self._audit.begin(model, call.data, found.entry.value)
        if not keeps:
            return
        entry = found.entry
        values: dict[str, Value] = {
            "ringmesh.response.bytes": len(entry.value),
            "ringmesh.compute_us": entry.compute_us,
            "ringmesh.cost": self._cost.of(model.provider, entry.compute_us),
        }
        tier = _TIERS.get(found.outcome, "")
        if tier:
            values["ringmesh.cache.age_ms"] = end // 1_000_000 - entry.created_at_ms
        names = (
            ("ringmesh.cache.outcome", found.outcome),
            ("ringmesh.kept", "sampled" if call.trace.sampled else "slow"),
            ("ringmesh.worker.id", found.worker),
            ("ringmesh.provider", call.provider),
            ("ringmesh.cache.tier", tier),
        )
        if reason := call.reason or found.reason:
            values["ringmesh.cache.reason"] = reason
        self._keep(call, labels, end, names, values, slow=slow)

    def failure(self, call: Call, error: RingmeshError) -> Failure:
        """The failure for the caller. Counts the call."""
        keep = self._count_failed(call, error.code, error.message, error.kind)
        return failure(error, (("ringmesh-trace-id", call.trace.trace_id),), keep)

    def computed_late(self, call: Call) -> None:
        """Counts what was computed for a call that had failed by then: its deadline passed, or its caller left."""
        if self._meter is not None and call.failed is not None:
            labels, stages = call.failed
            self._meter.computed_late(labels, call.trace, stages)

    def left(self, call: Call) -> None:
        """Counts a call that its caller cancelled."""
        self._count_failed(call, grpc.StatusCode.CANCELLED, "the caller left", "cancelled")()

    def _count_failed(self, call: Call, code: grpc.StatusCode, message: str, kind: str) -> Callable[[], None]:
        """Counts a failed call. Returns the remaining work, to be called after the answer was sent."""
        end = time.time_ns()
        model, version = (call.model.name, call.model.version) if call.model is not None else (OTHER, "")
        labels = (call.method, model, version, call.tenant, code.name, outcome_of(kind))
        self._requests.count(labels, elapsed(call.start, end), 0)
        self._requests.failed(model, version, kind)
        call.failed = labels, len(call.trace.stages)
        if self._meter is not None:
            worker_type = call.model.worker_type if call.model is not None else CPU
            self._meter.failed(labels, call.trace, worker_type, call.start, end, call.router_ns, len(call.data))
        names = (
            ("ringmesh.kept", "sampled" if call.trace.sampled else "failed"),
            ("ringmesh.error", kind),
        )
        values: dict[str, Value] = {"ringmesh.cache.reason": call.reason} if call.reason else {}
        if call.model is None:
            values["ringmesh.model.name"] = call.name
        return partial(self._keep, call, labels, end, names, values, code, message, kind=kind)

    def _keep(
        self,
        call: Call,
        labels: LabelValues,
        end: int,
        names: Names,
        values: dict[str, Value],
        code: grpc.StatusCode = grpc.StatusCode.OK,
        message: str = "",
        *,
        slow: bool = False,
        kind: str = "",
    ) -> None:
        """Retains the trace of a call that is sampled, slow or failed; logs it if it is slow or failed.

        `names` and `values` are attributes of its span; those of `names` are of many spans, and left out where empty.
        What a caller may choose, such as the name of a model that does not exist, is in `values`: `names` are kept.
        """
        # The clock may have been set back meanwhile.
        end = max(call.start, end)
        trace = call.trace
        self._requests.exemplify(labels, end - call.start, trace.trace_id, end)
        state, baggage = protocol.state_and_baggage(call.metadata)
        trace.state = w3c.usable_state(state)
        caller = call.caller_metadata
        identity = caller.identity.id if caller is not None and caller.identity is not None else ""
        model, version = (call.model.name, call.model.version) if call.model is not None else ("", "")
        shared = _shared(call.method, code.value[0], model, version, call.tenant, identity, names)
        values["ringmesh.request.bytes"] = len(call.data)
        if call.request_hash:
            values["ringmesh.key"] = call.request_hash[:8].hex()
        if baggage:
            values |= {f"baggage.{key}": value for key, value in w3c.parse_baggage(baggage).items()}
        name = protocol.full_name(call.method)
        self._tracer.finish(trace, name, call.start, end, values, message, shared=shared)
        if code is not grpc.StatusCode.OK or slow:
            self._log.write(
                code=code.name,
                error=message,
                duration_ns=end - call.start,
                trace_id=trace.trace_id,
                method=call.method,
                model=call.name,
                version=labels[2],
                tenant=call.tenant,
                outcome=labels[5],
                type=kind,
            )


@lru_cache(1024)
def _shared(
    method: str, code: int, model: str, version: str, tenant: str, identity: str, names: Names
) -> SharedAttributes:
    """The attributes of a call's span that many others have, too."""
    attributes = protocol.span_attributes(method, code)
    attributes["ringmesh.model.version"] = version
    named = (("ringmesh.model.name", model), ("ringmesh.tenant", tenant), ("ringmesh.identity", identity), *names)
    attributes |= {name: value for name, value in named if value}
    return SharedAttributes(attributes)
