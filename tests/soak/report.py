"""The table of a soak, as docs/soak.md and docs/soak-identity.md show it."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping

from tests.soak.faults import STOPPED_SECONDS
from tests.soak.identity import APPLIED_SECONDS, TENANTS
from tests.soak.intruders import ACROSS, IdentifiedCallers
from tests.soak.traffic import DEADLINE_SECONDS, Callers, Tally
from tests.soak.watch import FIGURES, SETTLED_SECONDS

# Of valid requests, answers in time.
LEAST_ANSWERED = 0.9999


def write(
    seconds: float,
    seed: int,
    callers: Callers,
    struck: Mapping[tuple[str, str], int],
    slopes: Mapping[str, list[tuple[float, float]]],
    memory: Mapping[str, list[float]],
    left: Mapping[str, float],
) -> tuple[str, bool]:
    """The page, and whether the run passed."""
    tallies = callers.tallies
    valid = tallies["valid"]
    answered = valid.answered / max(1, valid.sent)
    wrong, hung = (sum(getattr(tally, what) for tally in tallies.values()) for what in ("wrong", "hung"))
    in_flight = sum(left.values())
    passed = not wrong and not hung and not in_flight and valid.sent > 0 and answered >= LEAST_ANSWERED
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    identified = isinstance(callers, IdentifiedCallers)
    lines = [
        f"# Soak{' with identity' * identified}",
        "",
        f"Written by `make soak{' ARGUMENTS=--identity' * identified}`; do not edit. `ringmesh up` with two routers,",
        "two workers, Valkey, cache and console, as installed (compiled), with both cache tiers full. Valid answers",
        "are compared with ONNX Runtime in the process of the caller. Every call has a deadline of "
        f"{DEADLINE_SECONDS:g} s; valid",
        "ones use `ringmesh.channel_options()`. One fault at a time, in a fixed order (`tests/soak/faults.py`);",
        "kills end at half time.",
        "",
        *(_about_identity(callers) if isinstance(callers, IdentifiedCallers) else ()),
        f"{seconds / 60:g} minutes, seed {seed}, commit {commit}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}: **{'passed' if passed else 'failed'}**. {wrong} wrong answers, {hung} calls",
        f"that did not end, {answered:.4%} of valid requests answered, {in_flight:g} in flight at the end"
        + (f", {tallies[ACROSS].wrong} answers across tenants." if identified else "."),
        "",
        "| calls | sent | ended as they should | wrong | did not end | slowest s | codes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {kind} | {tally.sent:,} | {tally.answered:,} | {tally.wrong} | {tally.hung} | {tally.slowest:.2f} | "
        f"{', '.join(f'{code} {count:,}' for code, count in tally.codes.most_common()) or '-'} |"
        for kind, tally in tallies.items()
    ]
    lines += ["", f"| fault (stopped: for {STOPPED_SECONDS:g} s) | times |", "| --- | ---: |"]
    lines += [f"| {kind} {target} | {count} |" for (kind, target), count in sorted(struck.items())]
    if isinstance(callers, IdentifiedCallers):
        lines += ["", "| rotation | times |", "| --- | ---: |"]
        lines += [f"| {what} | {count} |" for what, count in callers.identity.rotations.items()]
    lines += [
        "",
        "Medians, and how much the fitted line rises in ten minutes, of each process since its last start. In runs",
    ]
    lines += [f"of more than {3 * SETTLED_SECONDS / 60:g} minutes, without its first {SETTLED_SECONDS / 60:g} minutes."]
    titles = " | ".join(f"{figure} | in 10 min" for figure in FIGURES)
    lines += ["", f"| process | {titles} |", "| --- |" + " ---: |" * (2 * len(FIGURES))]
    lines += [
        f"| {name} | " + " | ".join(f"{median:.1f} | {slope:+.2f}" for median, slope in figures) + " |"
        for name, figures in sorted(slopes.items())
    ]
    lines += ["", "Memory in MB, medians of five minutes each:", ""]
    lines += [f"- {name}: {', '.join(f'{megabytes:.0f}' for megabytes in windows)}" for name, windows in memory.items()]
    examples = [
        f"- {kind}, {code}: {example}"
        for kind, tally in tallies.items()
        for code, example in tally.examples.items()
        if kind == "valid" or code in ("wrong", "OK", "INTERNAL", "UNKNOWN")
    ]
    if examples:
        lines += ["", "First of each that should not be:", "", *examples]
    return "\n".join(lines) + "\n", passed


def so_far(tallies: Mapping[str, Tally]) -> str:
    """One line while it runs."""
    valid, all_of = tallies["valid"], tallies.values()
    return (
        f"{valid.sent:,} valid, {valid.sent - valid.answered} of them unanswered or under way, "
        f"{sum(tally.wrong for tally in all_of)} wrong, {sum(tally.hung for tally in all_of)} did not end"
    )


def _about_identity(callers: IdentifiedCallers) -> list[str]:
    return [
        f"Callers reach the routers by mutual TLS through the edge (`--tls`, Envoy). {len(TENANTS)} tenants, each with",
        "a key of the role infer; they do not share answers. Keys and certificates are replaced each minute, each",
        "third time with a new CA. Valid callers wait for the edge while it is down. `across tenants`: two tenants ask",
        "the same, which nobody asked before; wrong if one of them is told a hit or that it joined. `own again`: then",
        f"one of them asks again, and {callers.hits:,} of {callers.again:,} answers were hits. Whoever has no key,",
        "a wrong or revoked one, another tenant, too low a role, no certificate, one of a removed CA or no TLS must be",
        f"refused. A revoked key was last answered {callers.revoked_seconds:.1f} s after its line was removed; wrong",
        f"after {APPLIED_SECONDS:g} s, of which a router may be stopped for {STOPPED_SECONDS:g}. Services call each",
        "other in plain text on this host; the intruders try that too.",
        "",
    ]
