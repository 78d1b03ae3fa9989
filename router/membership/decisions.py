"""The fleet's decisions to load or unload models, as the workers list them."""

from __future__ import annotations

from collections.abc import Sequence

from ringmesh.inference.v1 import inference_pb2

from router.balancing.member import Member


def newest_decisions(members: Sequence[Member]) -> dict[str, tuple[int, Member]]:
    """By model: the time of the fleet's last decision in Unix nanoseconds, and a worker that has it."""
    newest: dict[str, tuple[int, Member]] = {}
    for member in members:
        for decided in member.decisions:
            if decided.fleet and decided.decided_unix_ns > newest.get(decided.model, (0, member))[0]:
                newest[decided.model] = (decided.decided_unix_ns, member)
    return newest


def missed_decisions(member: Member, newest: dict[str, tuple[int, Member]]) -> dict[str, Member]:
    """The models on which the worker lacks the last decision, each with a worker that has it."""
    known = {decided.model: decided.decided_unix_ns for decided in member.decisions}
    return {model: source for model, (decided_ns, source) in newest.items() if known.get(model, 0) < decided_ns}


def current_models(
    healthy: Sequence[Member], listed: Sequence[Member]
) -> tuple[list[list[inference_pb2.ModelVersion]], list[inference_pb2.FailedVersion]]:
    """The models of each healthy worker, without those that another worker has replaced or unloaded for the fleet, and
    without ensembles that have such a step; and why models are served by no worker until an unreachable one returns.

    `listed`: all workers of the fleet. The decisions of one that cannot be reached still apply.
    """
    newest = newest_decisions(listed)
    if not newest:
        return [list(member.models) for member in healthy], []
    current = []
    reasons: dict[str, str] = {}
    for member in healthy:
        missed = missed_decisions(member, newest)
        current.append([model for model in member.models if missed.keys().isdisjoint(_parts(model))])
        for model in member.models:
            for source in [missed[part] for part in _parts(model) if part in missed]:
                if not source.healthy:
                    reasons[model.name] = f"only worker {source.worker_id}, which cannot be reached, has its last files"
    served = {model.name for models in current for model in models}
    failed = [inference_pb2.FailedVersion(model=name, reason=reasons[name]) for name in reasons if name not in served]
    return current, failed


def _parts(model: inference_pb2.ModelVersion) -> list[str]:
    return [model.name, *(step.model_name for step in model.ensemble.config.ensemble_scheduling.step)]
