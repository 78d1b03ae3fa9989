"""The cache audit: recomputes a share of the hits; a model whose recomputed answers differ is no longer cached.

It detects what the analysis of a graph cannot: an operator whose randomness depends on its inputs, faulty hardware,
and a configuration that overruled the analysis. A finding applies to the model's digest, so new files start clean.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from router.admission.caller import ROUTER
from router.balancing.catalog import Catalog, ModelEntry
from router.dispatch.attempts import DispatchRequest, DispatchResult
from router.request.audit_comparison import Comparison, compare
from services.runtime import driver
from services.runtime.errors import NotFoundError, RingmeshError, UnavailableError
from services.runtime.telemetry.metrics import Family, Sample
from services.runtime.telemetry.supervisor import BACKGROUND
from services.runtime.telemetry.tracing import untraced
from services.runtime.verdict import YES, Verdict

log = logging.getLogger(__name__)

AUDITS = Family(
    "ringmesh_cache_audits_total",
    "counter",
    "hits computed again, by result: equal, close (other last bits), different, failed",
    ("model", "version", "result"),
)
LARGEST = Family(
    "ringmesh_cache_audit_largest_difference",
    "gauge",
    "largest difference between a number of an audited answer and its recomputed value",
    ("model", "version"),
)
DISTRUSTED = Family(
    "ringmesh_cache_audit_distrusted",
    "gauge",
    "1 if the audit took the model off the cache, 0 otherwise",
    ("model", "version"),
)

# Audits run one at a time, at least _SECONDS_APART apart. Each is followed by a pause of _REST times its duration, so
# audits use at most a twentieth of one worker slot.
_SECONDS_APART = 0.05
_REST = 20.0
_DEADLINE_SECONDS = 30.0
# A model is distrusted after this many different answers, if they are also at least this share of the audited ones.
_LEAST_DIFFERENT = 3
_LARGEST_PART = 0.01
_MAX_MODELS = 1000


class ModelAudit:
    """Audit results of one model digest."""

    def __init__(self, model: ModelEntry) -> None:
        self.model = model
        self.results = {"equal": 0, "close": 0, "different": 0, "failed": 0}
        self.largest = 0.0

    def may_cache(self) -> Verdict:
        different = self.results["different"]
        audited = different + self.results["equal"] + self.results["close"]
        if different < _LEAST_DIFFERENT or different < _LARGEST_PART * audited:
            return YES
        return Verdict(
            f"{different} of {audited} answers that were computed again for the audit came out different, "
            f"by up to {self.largest:g}"
        )


class Audit:
    """Audits on average `share` of the hits, within the limits above. `run` as Dispatcher.run.

    `distrusted` maps the digest of each model that is no longer cached to the reason.
    """

    def __init__(
        self,
        run: Callable[[DispatchRequest], Coroutine[Any, Any, DispatchResult]],
        share: float,
        clock: Callable[[], float],
    ) -> None:
        self._run = run
        self._share = share
        self._clock = clock
        self._left = self._interval()
        self._not_before = -math.inf
        self._task: asyncio.Task[None] | None = None
        self._audits: dict[bytes, ModelAudit] = {}
        self.distrusted: dict[bytes, str] = {}

    def takes_hit(self) -> bool:
        """Whether to audit this hit. Must be called once for each hit."""
        self._left -= 1
        if self._left >= 0:
            return False
        self._left = self._interval()
        return True

    def begin(self, model: ModelEntry, request: bytes, answer: bytes) -> None:
        """Starts an audit of a cached answer to the serialized `request`.

        Does nothing if another audit runs or has just ended, or if the request's outputs have parameters.
        """
        if self._task is None and self._clock() >= self._not_before and not _has_output_parameters(request):
            self._task = BACKGROUND.once("audit", partial(self._audit, model, request, answer))

    def may_cache(self, model: ModelEntry, catalog: Catalog) -> Verdict:
        """Whether the answers of the model, or of the steps of this ensemble, are trusted."""
        if reason := self.distrusted.get(model.digest):
            return Verdict(reason)
        for step in model.plan.steps if model.plan is not None else ():
            with suppress(NotFoundError, UnavailableError):
                if reason := self.distrusted.get(catalog.find(step.model, step.version).digest):
                    return Verdict(f"of its step {step.model!r}: {reason}")
        return YES

    def samples(self) -> Iterator[Sample]:
        """For `Metrics.add`. Digests of the same version share one series."""
        results: dict[tuple[str, str, str], int] = {}
        largest: dict[tuple[str, str], float] = {}
        distrusted: dict[tuple[str, str], bool] = {}
        for digest, audit in self._audits.items():
            version = (audit.model.name, audit.model.version)
            for result, count in audit.results.items():
                results[*version, result] = results.get((*version, result), 0) + count
            largest[version] = max(largest.get(version, 0.0), audit.largest)
            distrusted[version] = digest in self.distrusted  # the latest digest comes last
        for labels, count in results.items():
            yield Sample(AUDITS, labels, count)
        for version, difference in largest.items():
            yield Sample(LARGEST, version, difference)
            yield Sample(DISTRUSTED, version, distrusted[version])

    def _interval(self) -> float:
        """How many hits to skip before the next audit: random, so that no regular pattern of requests evades it."""
        if self._share in (0, 1):
            return math.inf if not self._share else 0
        return math.floor(math.log(1 - random.random()) / math.log1p(-self._share))

    async def _audit(self, model: ModelEntry, request: bytes, answer: bytes) -> None:
        began = self._clock()
        audit = self._audits.get(model.digest)
        if audit is None:
            if len(self._audits) >= _MAX_MODELS:
                self._audits.clear()
            audit = self._audits[model.digest] = ModelAudit(model)
        try:
            # The request joins no other and may go to any worker: the one that computed it first may be the faulty one.
            deadline = time.monotonic() + _DEADLINE_SECONDS
            repeated = DispatchRequest(model, request, b"", untraced(), deadline=deadline, caller=ROUTER)
            result, _ = await driver.run(self._run(repeated), deadline)
            if result.model_digest == model.digest:
                self._note(audit, compare(answer, result.response))
        except RingmeshError as refusal:
            audit.results["failed"] += 1
            log.debug("an answer of %s could not be computed again: %s", model.name, refusal.message)
        except Exception as error:
            BACKGROUND.failed("audit", error)
        finally:
            took = self._clock() - began
            self._not_before = self._clock() + max(_SECONDS_APART, _REST * took)
            self._task = None

    def _note(self, audit: ModelAudit, comparison: Comparison) -> None:
        audit.results[comparison.result] += 1
        audit.largest = max(audit.largest, comparison.largest)
        model = audit.model
        verdict = audit.may_cache()
        if not verdict and model.digest not in self.distrusted:
            self.distrusted[model.digest] = verdict.reason
            log.warning("model %s/%s leaves the cache: %s", model.name, model.version, verdict.reason)


def _has_output_parameters(request: bytes) -> bool:
    """Whether an output has parameters: classification formats numbers as text, whose last digits mean nothing."""
    return any(output.parameters for output in v2.ModelInferRequest.FromString(request).outputs)
