"""The fleet's decisions to load or unload models, as the workers list them."""

from __future__ import annotations

from collections.abc import Iterable

from router.balancing.member import Member


def newest_decisions(members: Iterable[Member]) -> dict[str, tuple[int, Member]]:
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
