"""Findings: faults that the console detects in the fleet's metrics, traces and state, with their location."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeAlias
from urllib.parse import quote, urlencode

from services.console.data import overview
from services.console.data.fleet_watch import FleetSnapshot
from services.console.data.history import History, Labels
from services.console.data.overview import ATTEMPT, LOOP_LAG, REQUESTS, SERVER_FAULTS, STAGE
from services.console.data.trace_store import TraceStore
from services.console.data.units import number, percent, seconds
from services.runtime.telemetry.metrics import OTHER

Severity: TypeAlias = Literal["critical", "warning", "note"]

_WINDOW = 120.0
# A worker is slow if it takes this many times as long as its peers for the same model, over at least this many runs.
_SLOW_FACTOR = 2.5
_SLOW_RUNS = 5
# A process that is starved of CPU between requests has normal compute times, but its answers are late.
_STALLED_SECONDS = 3e-3
_STALLED_ATTEMPTS = 50
_ERROR_SHARE = 0.01
_LAG_SECONDS = 0.2
_FAILING_A_MINUTE = 3.0
_MOST_NAMED = 5
# Up to this many similar findings are reported one by one; more are combined into one.
_MOST_ALIKE = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault. `where` names the part of the fleet; `link` is the page with details."""

    severity: Severity
    title: str
    where: str
    detail: str
    link: str

    @property
    def link_text(self) -> str:
        return re.split("[/#?]+", self.link)[1]


def find(view: FleetSnapshot, history: History, traces: TraceStore, silent: dict[str, str]) -> list[Finding]:
    """Returns all findings, the most severe first. `silent`: why there are no metrics, by process."""
    found = [
        *_routers(view),
        *_workers(view),
        *_redis(history),
        *_slow_workers(history),
        *_errors(history, traces),
        *_models(view),
        *_audit(history),
        *_cache(view),
        *_processes(history, silent),
        *_background(history),
    ]
    return sorted(found, key=lambda finding: ("critical", "warning", "note").index(finding.severity))


def _routers(view: FleetSnapshot) -> Iterator[Finding]:
    for router in view.routers:
        if router.is_down:
            yield Finding(
                "critical",
                "Router is down",
                f"router {router.address}",
                f"{router.address}: {router.problem}. The values below are from its last answer.",
                "/#routers",
            )


def _workers(view: FleetSnapshot) -> Iterator[Finding]:
    if view.router is None:
        return
    workers = view.workers.values()
    unhealthy = {worker.id or worker.address: worker for worker in workers if not worker.healthy}
    rest = len(workers) - len(unhealthy)
    effect = "The next worker on the ring gets its keys." if rest else "No worker is left: requests fail."
    for names in _alike([*unhealthy]):
        first = unhealthy[names[0]]
        yield Finding(
            "critical",
            "Worker gets no requests" if len(names) == 1 else "Workers get no requests",
            _named("worker", names),
            f"{first.address}: {first.reason}. {effect}",
            "/#workers",
        )
    if not workers:
        yield Finding(
            "critical",
            "The ring is empty",
            "router",
            "The router knows no worker. RINGMESH_WORKERS lists them.",
            "/#workers",
        )


def _redis(history: History) -> Iterator[Finding]:
    breakers = history.last("ringmesh_redis_breaker_open", ("target",))
    skipped = sorted(target for (target,), is_open in breakers.items() if is_open)
    failures = history.increase("ringmesh_cache_failures_total", _WINDOW, ("target",), tier="shared")
    if skipped:
        yield Finding(
            "critical",
            "Redis is down",
            f"shared cache tier, seen by {', '.join(skipped)}",
            "Look-ups failed or were too slow, so the breaker is open and the shared tier is skipped. "
            "Requests are answered, but results that another process has computed are computed again.",
            "/cache#shared",
        )
        return
    for (target,), count in failures.items():
        if count >= _FAILING_A_MINUTE * _WINDOW / 60:
            yield Finding(
                "warning",
                "Redis fails sometimes",
                f"shared cache tier, seen by {target}",
                f"{number(count)} look-ups or fills failed in the last {seconds(_WINDOW)}.",
                "/cache#shared",
            )


def _slow_workers(history: History) -> Iterator[Finding]:
    """Compares each worker with the median of the others, by compute time of a model or by time beyond its work."""
    by = ("model", "version", "target")
    runs = history.increase(f"{STAGE}_count", _WINDOW, by, stage="compute")
    means: dict[Labels, dict[str, float]] = {}
    for key, mean in overview.means(history, STAGE, _WINDOW, by, stage="compute").items():
        if runs[key] >= _SLOW_RUNS:
            means.setdefault(key[:2], {})[key[2]] = mean
    worst: dict[str, tuple[float, str]] = {}
    for (model, _), by_target in means.items():
        for target, mean in by_target.items():
            others = [other for name, other in by_target.items() if name != target]
            if others and mean > _SLOW_FACTOR * median(others) and mean > 1e-3:
                factor = mean / median(others)
                detail = f"{model} takes {seconds(mean)} there and {seconds(median(others))} on the others"
                if target not in worst or factor > worst[target][0]:
                    worst[target] = (factor, detail)
    extra = _beyond_work(history)
    for worker, mean in extra.items():
        usual = median([other for name, other in extra.items() if name != worker] or [math.inf])
        if worker not in worst and mean > max(_SLOW_FACTOR * usual, _STALLED_SECONDS):
            detail = f"its answers take {seconds(mean)} beyond its work, {seconds(usual)} on the others"
            worst[worker] = (mean / max(usual, 1e-6), detail)
    for target, (factor, detail) in worst.items():
        yield Finding(
            "warning",
            "Worker is slow",
            f"worker {target}",
            f"{detail}: {factor:.1f} times as long. Possible causes: other programs on its cores, throttling, swap.",
            f"/traces?{urlencode({'worker': target, 'sort': 'slowest'})}",
        )


def _beyond_work(history: History) -> dict[str, float]:
    """Returns, by worker, the mean seconds of an attempt that were spent in transit or while the worker did not run."""
    total, count = (history.increase(f"{ATTEMPT}_{part}", _WINDOW, ("worker",)) for part in ("sum", "count"))
    worked = history.increase(f"{STAGE}_sum", _WINDOW, ("target",))
    return {
        worker: max(0.0, total.get((worker,), 0.0) - worked.get((worker,), 0.0)) / attempts
        for (worker,), attempts in count.items()
        if attempts >= _STALLED_ATTEMPTS
    }


def _errors(history: History, traces: TraceStore) -> Iterator[Finding]:
    """Yields one finding per code and model, or one for all models if many have the same code. Most frequent first."""
    asked = history.increase(REQUESTS, _WINDOW, ("model", "tenant"))
    by_code = history.increase(REQUESTS, _WINDOW, ("model", "tenant", "code", "outcome"))
    groups: dict[tuple[str, bool], dict[str, dict[str, float]]] = {}
    for (model, tenant, code, outcome), count in sorted(by_code.items(), key=lambda item: -item[1]):
        if code != "OK" and count >= 1 and count >= _ERROR_SHARE * asked[model, tenant]:
            group = (code, outcome == "refused")
            groups.setdefault(group, {}).setdefault(model, {})[tenant] = count
    last = traces.last_failures() if groups else {}
    for (code, is_limit), models in groups.items():
        severity, title = _weight(code, is_limit=is_limit)
        for names in _alike([*models]):
            failed = {(model, tenant): count for model in names for tenant, count in models[model].items()}
            # Requests for models that no worker serves are counted under OTHER.
            known = [model for model in names if model != OTHER]
            failures = [
                one
                for (model, last_code), one in last.items()
                if last_code == code and (model in known or OTHER in names)
            ]
            newest = max(failures, key=lambda one: one.start_ns, default=None)
            message = f" The last message: {newest.error}" if newest else ""
            count, all_asked = sum(failed.values()), sum(asked[who] for who in failed)
            text = {"model": known[0]} if len(known) == len(names) == 1 else {"text": code}
            yield Finding(
                severity,
                title,
                f"{_named('model', known) or 'models that are unknown or not served'}"
                f"{_of(dict.fromkeys(tenant for _, tenant in failed))}",
                f"{number(count)} {'request' if count == 1 else 'requests'} in the last {seconds(_WINDOW)} "
                f"({percent(count / all_asked)} of theirs) "
                f"ended with {code}.{message}",
                f"/traces?{urlencode({'status': 'error', **text})}",
            )


def _weight(code: str, *, is_limit: bool) -> tuple[Severity, str]:
    """How severe requests are that end with `code`, and in words. `is_limit`: they were more than the caller may."""
    if is_limit:
        return "note", "Requests are refused by a limit of their caller"
    return ("critical", "Requests fail") if code in SERVER_FAULTS else ("warning", "Requests are refused")


def _of(tenants: Iterable[str]) -> str:
    """Returns the tenants as text; "" if no request names a tenant."""
    named = _named("tenant", [tenant for tenant in tenants if tenant])
    return f", {named}" if named else ""


def _alike(names: Sequence[str]) -> list[list[str]]:
    """Groups names for findings: one group per name, or a single group if there are many."""
    return [[*names]] if len(names) > _MOST_ALIKE else [[name] for name in names]


def _named(kind: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    which = f"{', '.join(names[:_MOST_NAMED])}{more}"
    return f"{kind}{'' if len(names) == 1 else 's'} {which}" if names else ""


def _models(view: FleetSnapshot) -> Iterator[Finding]:
    unserved = {
        f"{model.name} {model.version}".rstrip(): model for model in view.models if model.state == "UNAVAILABLE"
    }
    for names in _alike([*unserved]):
        first = unserved[names[0]]
        yield Finding(
            "warning",
            "Model is not served" if len(names) == 1 else "Models are not served",
            _named("model", names),
            first.reason or "unloaded",
            f"/models/{quote(first.name)}",
        )
    for model in view.models:
        if len({replica.served.digest for replica in model.replicas}) > 1:
            yield Finding(
                "note",
                "Workers differ",
                f"model {model.name} {model.version}",
                "Workers hold different content under one version. Cached answers are kept apart by content.",
                f"/models/{quote(model.name)}",
            )


def _audit(history: History) -> Iterator[Finding]:
    distrusted = history.last("ringmesh_cache_audit_distrusted", ("model", "version"))
    for (model, version), is_off in distrusted.items():
        if is_off:
            yield Finding(
                "warning",
                "Model gives different answers",
                f"model {model} {version}",
                "Recomputed answers differed from the cached ones, so its answers are not cached any more: they are "
                "correct, but slower. Possible causes: a random operator, or faulty hardware of a worker.",
                f"/models/{quote(model)}",
            )


def _cache(view: FleetSnapshot) -> Iterator[Finding]:
    if view.cache.is_down:
        yield Finding(
            "warning",
            "Cache service is down",
            f"cache {view.cache.address}",
            f"{view.cache.problem}. Routers use Redis themselves and do not need it; other services do.",
            "/cache",
        )


def _processes(history: History, silent: dict[str, str]) -> Iterator[Finding]:
    for name, problem in silent.items():
        yield Finding("warning", "Process has no metrics", name, problem, "/#processes")
    lag = history.quantile(0.99, LOOP_LAG, _WINDOW, ("target",))
    for (target,), p99 in lag.items():
        if not math.isnan(p99) and p99 > _LAG_SECONDS:
            yield Finding(
                "warning",
                "Process responds late",
                target,
                f"Its event loop calls back {seconds(p99)} late (p99): it lacks CPU time, or something blocks it.",
                "/#processes",
            )


def _background(history: History) -> Iterator[Finding]:
    for target, task, reason in history.last("ringmesh_background_failing", ("target", "task", "reason")):
        yield Finding(
            "warning",
            "Background task fails",
            target,
            f"Background task {task!r} keeps failing and is restarted: {reason}",
            "/#processes",
        )
