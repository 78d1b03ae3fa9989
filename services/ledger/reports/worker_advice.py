"""From replayed demand: how many workers of which type at which hours, which models share them, and larger batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports.demand import Hour, Request
from services.ledger.reports.rating import Rating
from services.ledger.reports.replay import ReplayedRequest, RunTime, fitted, needed, percentile_99, replay
from services.ledger.storage.times import text

# Batches of so many times the largest that was seen are tried, and advised if they save that part of compute.
_LARGER = (2, 4, 8)
_WORTH = 0.02
# So many models, those that run longest, are tried on workers of their own.
_MOST_APART = 5

# Worker type by model; a model that is not in it stays on the types that it ran on.
Placement = Mapping[str, str]
_AS_IT_IS: Placement = {}


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """Workers of a type in an hour: what they are to compute, how many meet the objective, and with what latency."""

    work: Sequence[ReplayedRequest]
    workers: int
    latency_us: int


class WorkerAdvice:
    """Of `hours`, the price of each of which is that of its place in `rating`; `latency_us` is the objective."""

    def __init__(self, hours: Sequence[Hour], rating: Rating, latency_us: int) -> None:
        self._hours = hours
        self._rating = rating
        self._latency_us = latency_us
        self._requests = [request for hour in hours for request in hour.requests]
        self._times = _times(self._requests)
        self._replay_error: float | None = None
        self.warnings: list[str] = []

    def advise(self) -> tuple[list[ledger_pb2.AdvisedWorkers], list[ledger_pb2.Recommendation]]:
        """For each hour and type, and what to do. On a thread: it takes seconds."""
        if not self._requests:
            self.warnings.append("nothing was computed in this time")
            return [], []
        self._replay_error = self._error()
        found = {name: self._pools(placement) for name, placement in self._placements().items()}
        costs = {name: self._cost(pools) for name, pools in found.items()}
        best = min(costs, key=lambda name: costs[name])
        pools = found[best]
        for model in sorted({request.model for request in self._requests}):
            if self._alone(model) > self._latency_us:
                self.warnings.append(
                    f"runs of {model} alone take longer than {self._latency_us / 1000:g} ms: no number of workers helps"
                )
        return self._lines(pools), [
            self._workers(best, pools, costs),
            *self._sharing(pools),
            *self._batches(pools),
        ]

    def _placements(self) -> dict[str, Placement]:
        """What may be run where: of a type on which a model never ran, nobody knows how long it takes."""
        models = {request.model for request in self._requests}
        types = sorted({request.worker_type for request in self._requests})
        known = {
            worker_type: {model for model in models if (worker_type, model) in self._times} for worker_type in types
        }
        found = {"each model where it ran": _AS_IT_IS}
        found |= {
            f"all on {worker_type}": dict.fromkeys(models, worker_type)
            for worker_type in types
            if len(types) > 1 and known[worker_type] == models
        }
        if len(types) > 1:
            found["each model where it costs least"] = {
                model: min((self._dear(kind, model), kind) for kind in types if model in known[kind])[1]
                for model in models
            }
        return found

    def _pools(self, placement: Placement) -> dict[tuple[int, str], WorkerPool]:
        """By the hour's place and worker type."""
        pools = {}
        for place, hour in enumerate(self._hours):
            for worker_type, work in self._work(hour.requests, placement, self._times).items():
                workers, latency = self._needed(place, worker_type, work, _of(self._times, worker_type))
                pools[place, worker_type] = WorkerPool(work, workers, latency)
        return pools

    def _work(
        self, requests: Iterable[Request], placement: Placement, times: Mapping[tuple[str, str], RunTime]
    ) -> dict[str, list[ReplayedRequest]]:
        """By worker type. What took longer than usual on its own type does on others."""
        found: dict[str, list[ReplayedRequest]] = {}
        for request in requests:
            usual = times[request.worker_type, request.model].share(request.batch)
            worker_type = placement.get(request.model, request.worker_type)
            weight = request.compute_us / usual if usual else 1.0
            found.setdefault(worker_type, []).append(ReplayedRequest(request.arrived_us, request.model, weight))
        return found

    def _needed(
        self, place: int, worker_type: str, work: Sequence[ReplayedRequest], times: Mapping[str, RunTime]
    ) -> tuple[int, int]:
        slots = self._slots(worker_type, place)
        return needed(work, self._latency_us, slots, self._hours[place].window_us, times)

    def _slots(self, worker_type: str, place: int) -> int:
        price = self._rating.price(worker_type, place)
        return price.slots if price is not None else 1

    def _worth(self, worker_type: str, place: int, workers: int) -> int:
        """The numerator of what so many workers cost in an hour."""
        us = workers * self._slots(worker_type, place) * self._hours[place].span_us
        return self._rating.rated(worker_type, place, us)

    def _cost(self, pools: Mapping[tuple[int, str], WorkerPool]) -> int:
        return sum(self._worth(worker_type, place, pool.workers) for (place, worker_type), pool in pools.items())

    def _dear(self, worker_type: str, model: str) -> tuple[bool, float]:
        """What is better is less: within the objective, then what a request costs."""
        time = self._times[worker_type, model].share(1)
        return time > self._latency_us, time * self._rating.rated(worker_type, 0, 1)

    def _alone(self, model: str) -> float:
        """The 99th percentile of how long its runs take by themselves."""
        times = {kind: time for (kind, name), time in self._times.items() if name == model}
        return percentile_99(
            [
                round(one.compute_us * times[one.worker_type].share(1) / (times[one.worker_type].share(one.batch) or 1))
                for one in self._requests
                if one.model == model
            ]
        )

    def _paid(self, place: int, worker_type: str) -> int:
        us = self._hours[place].paid_us.get(worker_type, 0) * self._slots(worker_type, place)
        return self._rating.rated(worker_type, place, us)

    def _lines(self, pools: Mapping[tuple[int, str], WorkerPool]) -> list[ledger_pb2.AdvisedWorkers]:
        lines = []
        for place, hour in enumerate(self._hours):
            work = self._work(hour.requests, _AS_IT_IS, self._times)
            advised = {kind for at, kind in pools if at == place}
            for worker_type in sorted(work.keys() | hour.up_us.keys() | advised):
                own = [request for request in hour.requests if request.worker_type == worker_type]
                up = hour.up_us.get(worker_type, 0) / hour.window_us
                servers = round(up) * self._slots(worker_type, place)
                replayed = (
                    replay(work[worker_type], servers, _of(self._times, worker_type)) if own and servers else None
                )
                pool = pools.get((place, worker_type), WorkerPool([], 0, 0))
                lines.append(
                    ledger_pb2.AdvisedWorkers(
                        begins_ms=hour.span.from_ms,
                        worker_type=worker_type,
                        requests=len(own),
                        compute_us=sum(request.compute_us for request in own),
                        workers=up,
                        measured_latency_us=percentile_99([request.latency_us for request in own]),
                        replayed_latency_us=percentile_99(replayed.latencies_us) if replayed else 0,
                        advised_workers=pool.workers,
                        advised_latency_us=pool.latency_us,
                        cost_nano=self._rating.nano(self._paid(place, worker_type)),
                        advised_cost_nano=self._rating.nano(self._worth(worker_type, place, pool.workers)),
                    )
                )
        return lines

    def _workers(
        self, best: str, pools: Mapping[tuple[int, str], WorkerPool], costs: Mapping[str, int]
    ) -> ledger_pb2.Recommendation:
        paid = sum(self._paid(place, kind) for place, hour in enumerate(self._hours) for kind in hour.paid_us)
        latency = max(pool.latency_us for pool in pools.values())
        others = "".join(
            f"; {name} would cost {self._rating.nano(cost) / 1e9:,.4f}" for name, cost in costs.items() if name != best
        )
        return ledger_pb2.Recommendation(
            kind=ledger_pb2.Recommendation.KIND_WORKERS,
            subjects=sorted({worker_type for _, worker_type in pools}),
            advice="; ".join(self._schedule(pools)) + (f", {best}" if len(costs) > 1 else ""),
            evidence=f"{len(self._requests):,} computed requests replayed: with these, 99 in 100 wait and run for at "
            f"most {latency / 1000:,.1f} ms in any hour{others}",
            saved_nano=self._rating.nano(paid) - self._rating.nano(costs[best]),
            error=self._replay_error,
        )

    def _schedule(self, pools: Mapping[tuple[int, str], WorkerPool]) -> list[str]:
        """Hours with equal numbers together."""
        found = []
        for worker_type in sorted({kind for _, kind in pools}):
            counts = [
                pools[place, worker_type].workers if (place, worker_type) in pools else 0
                for place in range(len(self._hours))
            ]
            parts = []
            for count, places in groupby(range(len(counts)), key=counts.__getitem__):
                here = list(places)
                begin, end = self._hours[here[0]].span.from_ms, self._hours[here[-1]].span.until_ms
                parts.append(f"{count} from {text(begin)[11:16]} to {text(end)[11:16]}")
            found.append(f"workers of type {worker_type}: {', '.join(parts)}")
        return found

    def _error(self) -> float | None:
        """Of the 99th percentile in the second half, as the first half predicts it; None: no worker was up.

        What came then is replayed with the run times of the first half, those of its requests taken in turn.
        """
        middle = (self._hours[0].window.from_ms + self._hours[-1].window.until_ms) // 2 * 1000
        first = [request for request in self._requests if request.arrived_us < middle]
        times = self._times | _times(first)
        known: dict[str, list[ReplayedRequest]] = {}
        for work in self._work(first, _AS_IT_IS, times).values():
            for one in work:
                known.setdefault(one.model, []).append(one)
        measured: list[int] = []
        replayed: list[int] = []
        for place, hour in enumerate(self._hours):
            second = [request for request in hour.requests if request.arrived_us >= middle]
            for worker_type, work in self._work(second, _AS_IT_IS, times).items():
                servers = round(hour.up_us.get(worker_type, 0) / hour.window_us) * self._slots(worker_type, place)
                if not servers:
                    continue
                expected = [
                    one._replace(weight=like[number % len(like)].weight) if (like := known.get(one.model)) else one
                    for number, one in enumerate(work)
                ]
                replayed += replay(expected, servers, _of(times, worker_type)).latencies_us
                measured += [request.latency_us for request in second if request.worker_type == worker_type]
        found = percentile_99(measured)
        return abs(percentile_99(replayed) - found) / found if found else None

    def _sharing(self, pools: Mapping[tuple[int, str], WorkerPool]) -> list[ledger_pb2.Recommendation]:
        """Models of a type that need fewer workers together than each its own; and those that need more together."""
        found = []
        for worker_type in sorted({kind for _, kind in pools}):
            own = {place: pool for (place, kind), pool in pools.items() if kind == worker_type}
            models = sorted({one.model for pool in own.values() for one in pool.work})
            if len(models) < 2:
                continue
            together = sum(self._worth(worker_type, place, pool.workers) for place, pool in own.items())
            each = {model: self._group(worker_type, own, {model}) for model in models}
            apart = sum(cost for cost, _ in each.values())
            if apart > together:
                most = max(own, key=lambda place: own[place].workers)
                count = own[most].workers
                enough = "1 is enough" if count == 1 else f"{count} are enough"
                found.append(
                    self._recommendation(
                        ledger_pb2.Recommendation.KIND_SHARE,
                        models,
                        f"let them share workers of type {worker_type}",
                        f"in the hour from {text(self._hours[most].span.from_ms)}, {enough} for "
                        f"them together, and {sum(counts[most] for _, counts in each.values())} "
                        "if each has its own",
                        apart - together,
                    )
                )
            longest = sorted(models, key=self._alone, reverse=True)[:_MOST_APART]
            for model in longest:
                rest, _ = self._group(worker_type, own, {*models} - {model})
                if rest + each[model][0] < together:
                    found.append(
                        self._recommendation(
                            ledger_pb2.Recommendation.KIND_SHARE,
                            [model],
                            f"give it workers of type {worker_type} of its own",
                            f"its runs take up to {self._alone(model) / 1000:,.1f} ms, for which the others wait",
                            together - rest - each[model][0],
                        )
                    )
                    break
        return found

    def _group(self, worker_type: str, pools: Mapping[int, WorkerPool], models: set[str]) -> tuple[int, dict[int, int]]:
        """What workers for only these models cost, and how many they are by hour."""
        counts = {}
        for place, pool in pools.items():
            work = [one for one in pool.work if one.model in models]
            counts[place], _ = self._needed(place, worker_type, work, _of(self._times, worker_type))
        return sum(self._worth(worker_type, place, count) for place, count in counts.items()), counts

    def _batches(self, pools: Mapping[tuple[int, str], WorkerPool]) -> list[ledger_pb2.Recommendation]:
        """Models that would compute less in larger runs, with the workers that are advised, within the objective."""
        found = []
        for (worker_type, model), time in sorted(self._times.items()):
            own = {
                place: pool
                for (place, kind), pool in pools.items()
                if kind == worker_type and any(one.model == model for one in pool.work)
            }
            if not (time.fixed and own):
                continue
            busy, _, _ = self._busy(worker_type, own, {})
            best = (0, time.most, 0, 0)
            for factor in _LARGER:
                larger = replace(time, most=time.most * factor)
                now, latency, is_met = self._busy(worker_type, own, {model: larger})
                if is_met and busy - now > best[0] + _WORTH * busy:
                    best = (busy - now, larger.most, latency, now)
            saved_us, most, latency, _ = best
            if saved_us:
                runs = [request.batch for request in self._requests if request.model == model]
                found.append(
                    self._recommendation(
                        ledger_pb2.Recommendation.KIND_BATCH,
                        [model],
                        f"let up to {most} of its requests run together on {worker_type}",
                        f"a run takes {time.fixed / 1000:,.2f} ms and {time.each / 1000:,.2f} ms a request; "
                        f"{len(runs) / sum(1 / size for size in runs):.1f} ran together on average, at most "
                        f"{time.most}; "
                        f"replayed, larger runs compute {saved_us / busy:.0%} less, 99 in 100 within "
                        f"{latency / 1000:,.1f} ms",
                        self._rating.rated(worker_type, 0, saved_us),
                        self._fit_error(worker_type, model),
                    )
                )
        return found

    def _busy(
        self, worker_type: str, pools: Mapping[int, WorkerPool], changed: Mapping[str, RunTime]
    ) -> tuple[int, int, bool]:
        """How long the workers run, the worst 99th percentile of an hour, and whether none is worse than advised."""
        times = _of(self._times, worker_type) | dict(changed)
        busy = worst = 0
        is_met = True
        for place, pool in pools.items():
            replayed = replay(pool.work, pool.workers * self._slots(worker_type, place), times)
            latency = percentile_99(replayed.latencies_us)
            busy, worst = busy + replayed.busy_us, max(worst, latency)
            is_met = is_met and latency <= max(self._latency_us, pool.latency_us)
        return busy, worst, is_met

    def _fit_error(self, worker_type: str, model: str) -> float | None:
        """Of the compute time of the second half of a model's requests, by its run times of the first half."""
        own = [one for one in self._requests if (one.worker_type, one.model) == (worker_type, model)]
        first, second = own[: len(own) // 2], own[len(own) // 2 :]
        measured = sum(one.compute_us for one in second)
        if not (first and measured):
            return None
        time = fitted([(one.batch, one.compute_us) for one in first])
        return abs(sum(time.share(one.batch) for one in second) - measured) / measured

    def _recommendation(
        self,
        kind: ledger_pb2.Recommendation.Kind.ValueType,
        subjects: Sequence[str],
        advice: str,
        evidence: str,
        saved: int,
        error: float | None = None,
    ) -> ledger_pb2.Recommendation:
        return ledger_pb2.Recommendation(
            kind=kind,
            subjects=subjects,
            advice=advice,
            evidence=evidence,
            saved_nano=self._rating.nano(saved),
            error=self._replay_error if error is None else error,
        )


def _times(requests: Iterable[Request]) -> dict[tuple[str, str], RunTime]:
    """By worker type and model."""
    runs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for request in requests:
        runs.setdefault((request.worker_type, request.model), []).append((request.batch, request.compute_us))
    return {key: fitted(found) for key, found in runs.items()}


def _of(times: Mapping[tuple[str, str], RunTime], worker_type: str) -> dict[str, RunTime]:
    """By model."""
    return {model: time for (kind, model), time in times.items() if kind == worker_type}
