"""Builds the replies to callers, and records them in metrics, traces and the log."""

from __future__ import annotations  # compiled by mypyc

import time
from collections.abc import Callable
from functools import partial

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
from services.runtime.telemetry.spans import Attributes, Value
from services.runtime.telemetry.tracing import Tracer

# One in _HITS_A_REPORT hits carries the load report: on every hit it would add 5 us each.
_HITS_A_REPORT = 16
_TIERS = {"hit-local": "local", "hit-shared": "shared", "hit-peer": "peer"}
_AUDITED = frozenset({"hit-local", "hit-shared"})


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
        attributes: dict[str, Value] = {
            "ringmesh.cache.outcome": found.outcome,
            "ringmesh.response.bytes": len(entry.value),
            "ringmesh.compute_us": entry.compute_us,
            "ringmesh.cost": self._cost.of(model.provider, entry.compute_us),
            "ringmesh.kept": "sampled" if call.trace.sampled else "slow",
        }
        if found.worker:
            attributes["ringmesh.worker.id"] = found.worker
        if call.provider:
            attributes["ringmesh.provider"] = call.provider
        if found.reason:
            attributes["ringmesh.cache.reason"] = found.reason
        if tier := _TIERS.get(found.outcome):
            attributes["ringmesh.cache.tier"] = tier
            attributes["ringmesh.cache.age_ms"] = end // 1_000_000 - entry.created_at_ms
        self._keep(call, labels, end, attributes, slow=slow)

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
        kept = "sampled" if call.trace.sampled else "failed"
        return partial(self._keep, call, labels, end, {"ringmesh.kept": kept, "ringmesh.error": kind}, code, message)

    def _keep(
        self,
        call: Call,
        labels: LabelValues,
        end: int,
        attributes: Attributes,
        code: grpc.StatusCode = grpc.StatusCode.OK,
        message: str = "",
        *,
        slow: bool = False,
    ) -> None:
        """Retains the trace of a call that is sampled, slow or failed; logs it if it is slow or failed."""
        # The clock may have been set back meanwhile.
        end = max(call.start, end)
        trace = call.trace
        self._requests.exemplify(labels, end - call.start, trace.trace_id, end)
        state, baggage = protocol.state_and_baggage(call.metadata)
        trace.state = w3c.usable_state(state)
        kept: dict[str, Value] = {
            **protocol.span_attributes(call.method, code.value[0]),
            "ringmesh.model.name": call.name,
            "ringmesh.model.version": call.model.version if call.model is not None else "",
            "ringmesh.request.bytes": len(call.data),
            **attributes,
        }
        if call.tenant:
            kept["ringmesh.tenant"] = call.tenant
        if call.caller_metadata is not None and call.caller_metadata.identity is not None:
            kept["ringmesh.identity"] = call.caller_metadata.identity.id
        if call.request_hash:
            kept["ringmesh.key"] = call.request_hash[:8].hex()
        if call.reason:
            kept["ringmesh.cache.reason"] = call.reason
        kept |= {f"baggage.{key}": value for key, value in w3c.parse_baggage(baggage).items()}
        self._tracer.finish(trace, protocol.full_name(call.method), call.start, end, kept, message)
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
                type=str(attributes.get("ringmesh.error", "")),
            )
