"""Renders charts as SVG without scripts or inline styles, with a text alternative for screen readers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from services.console.data.history import Floats
from services.console.data.units import UNKNOWN, clock, seconds, size

_WIDTH, _HEIGHT = 600.0, 120.0


def plot(
    title: str, edges: Floats, lines: Mapping[str, Floats | None], unit: Callable[[float], str], *, least: float = 0.0
) -> Markup:
    """Returns a figure of `lines`, by label, on one scale that starts at 0. None: a line without any values.

    `edges` are the times between the steps, in seconds. `least` is the minimum top of the scale.
    """
    missing = np.full(len(edges) - 1, math.nan)
    curves = {label: missing if line is None else line for label, line in lines.items()}
    known = {label: curve[~np.isnan(curve)] for label, curve in curves.items()}
    empty = not any(map(len, known.values()))
    highest = max([least, *(values.max(initial=0.0) for values in known.values())]) or 1.0
    # Sizes are shown in powers of 1024.
    prefix = 1024.0 ** math.floor(math.log(highest, 1024)) if unit is size else 1.0
    top = prefix * _nice(highest / prefix)
    now = {label: unit(values[-1] if len(values) else math.nan) for label, values in known.items()}
    peaks = {label: unit(values.max() if len(values) else math.nan) for label, values in known.items()}
    legend = (
        Markup(
            '<span class="key k{}"><svg viewBox="0 0 16 4" aria-hidden="true"><path d="M0 2H16"/></svg>'
            "{} <b>{}</b></span>"
        ).format(number, label, now[label])
        for number, label in enumerate(lines)
    )
    summary = "; ".join(f"{label}: now {now[label]}, highest {peaks[label]}" for label in lines)
    return Markup(
        '<figure class="chart"><figcaption><span class="title">{title}</span>{legend}</figcaption>'
        '<div class="plot" tabindex="0" role="group" aria-label="{title}: arrow keys read its values" '
        'data-steps="{steps}"><span class="top">{top}</span>'
        '<svg viewBox="0 0 600 120" preserveAspectRatio="none" role="img" aria-label="{title}. {summary}">'
        '<path class="grid" d="M0 1H600M0 60H600M0 119H600"/>{body}</svg>{empty}</div>'
        '<div class="axis"><span>{span} ago</span><span>now</span></div></figure>'
    ).format(
        title=title,
        legend=Markup("").join(legend),
        top=UNKNOWN if empty else unit(top),
        summary=summary,
        body=Markup("").join(_paths([*curves.values()], top)),
        empty=Markup('<p class="nodata">no data yet</p>') if empty else "",
        span=seconds(edges[-1] - edges[0]),
        steps="" if empty else _steps(edges, curves, unit),
    )


def _steps(edges: Floats, curves: Mapping[str, Floats], unit: Callable[[float], str]) -> str:
    """Returns the end of each step and its values as text, in JSON, for the script that shows them."""
    times = [clock(int(end * 1e9)) for end in edges[1:].tolist()]
    values = [list(map(unit, step)) for step in np.transpose([*curves.values()]).tolist()]
    return json.dumps({"labels": list(curves), "times": times, "values": values}, ensure_ascii=False)


def bar(share: float, kind: str = "") -> Markup:
    return Markup(
        '<svg class="bar {}" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="back" width="100" height="6"/><rect class="fill" width="{:.2f}" height="6"/></svg>'
    ).format(kind, 100 * min(1.0, max(0.0, share if share == share else 0.0)))


@dataclass(frozen=True, slots=True)
class RingSlice:
    """One owner on the ring: its `share` of the keys and its `load`, 0 to 1."""

    label: str
    share: float
    load: float
    healthy: bool


def ring(slices: Sequence[RingSlice], middle: str, below: str) -> Markup:
    """Returns a ring of arcs, one per owner, each with a band as wide as its load, numbered as in the table."""
    whole = sum(one.share for one in slices) or 1.0
    parts = []
    at = 0.0
    for number, one in enumerate(slices, start=1):
        width = one.share / whole
        gap = 0.004 if len(slices) > 1 else 0.0
        start, end = at + gap, max(at + gap, at + width - gap)
        kind = "arc" if one.healthy else "arc down"
        parts.append(
            Markup('<g class="{kind} shade{shade}"><title>{title}</title><path d="{d}"/>').format(
                kind=kind,
                shade=(number - 1) % 4,
                title=f"{one.label}: {one.share:.0%} of the keys{'' if one.healthy else ', gets no requests'}",
                d=_arc(start, end, 78, 100),
            )
        )
        if one.healthy and one.load > 0:
            parts.append(Markup('<path class="load" d="{}"/>').format(_arc(start, end, 74 - 16 * min(1, one.load), 74)))
        if width > 0.03:
            x, y = _point((start + end) / 2, 89)
            parts.append(Markup('<text x="{:.1f}" y="{:.1f}">{}</text>').format(x, y + 4, number))
        parts.append(Markup("</g>"))
        at += width
    if not slices:
        parts.append(Markup('<circle class="vacant" r="89"/>'))
    return Markup(
        '<svg class="ring" viewBox="-104 -104 208 208" role="img" aria-label="{label}">{parts}'
        '<text class="middle" y="-2">{middle}</text><text class="below" y="20">{below}</text></svg>'
    ).format(
        label="; ".join(f"{one.label} owns {one.share:.0%} of the keys" for one in slices)
        or "no worker is in the ring",
        parts=Markup("").join(parts),
        middle=middle,
        below=below,
    )


def _point(turn: float, radius: float) -> tuple[float, float]:
    angle = 2 * math.pi * turn
    return radius * math.sin(angle), -radius * math.cos(angle)


def _arc(start: float, end: float, inner: float, outer: float) -> str:
    end = min(end, start + 0.9999)
    large = int(end - start > 0.5)
    (ax, ay), (bx, by) = _point(start, outer), _point(end, outer)
    (cx, cy), (dx, dy) = _point(end, inner), _point(start, inner)
    return (
        f"M{ax:.2f} {ay:.2f}A{outer} {outer} 0 {large} 1 {bx:.2f} {by:.2f}"
        f"L{cx:.2f} {cy:.2f}A{inner:.2f} {inner:.2f} 0 {large} 0 {dx:.2f} {dy:.2f}Z"
    )


def _paths(lines: Sequence[Floats], top: float) -> Iterator[Markup]:
    for number, line in reversed(list(enumerate(lines))):
        x = np.linspace(0, _WIDTH, len(line))
        y = _HEIGHT - 1 - (_HEIGHT - 2) * np.minimum(1.0, line / top)
        known = np.flatnonzero(~np.isnan(line))
        # Draw the parts between gaps; a single value becomes a short line.
        for part in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1) if len(known) else ():
            d = "M" + "L".join(f"{x[i]:.1f} {y[i]:.1f}" for i in part) + ("h-3" if len(part) == 1 else "")
            if number == 0 and len(lines) <= 2:
                area = f"{d}L{x[part[-1]]:.1f} {_HEIGHT}L{x[part[0]]:.1f} {_HEIGHT}Z"
                yield Markup('<path class="area" d="{}"/>').format(area)
            yield Markup('<path class="line k{}" d="{}"/>').format(number, d)


def _nice(value: float) -> float:
    """Rounds up to the next of 1, 2, 2.5, 5 and 10, times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * 0.999)
