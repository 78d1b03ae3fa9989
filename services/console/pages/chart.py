"""Renders charts as SVG without scripts or inline styles, with a text alternative for screen readers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from services.console.data.history import Curve, Line
from services.console.data.units import UNKNOWN

_WIDTH, _HEIGHT = 600.0, 120.0


def plot(title: str, lines: Sequence[Line], unit: Callable[[float], str], *, least: float = 0.0) -> Markup:
    """Returns a figure of `lines` on one scale that starts at 0. `least` is the minimum top of the scale."""
    known = [value for line in lines for value in line.curve.values if not math.isnan(value)]
    top = _nice(max([least, *known]) or 1.0)
    legend = Markup("").join(
        Markup(
            '<span class="key k{}"><svg viewBox="0 0 16 4" aria-hidden="true"><path d="M0 2H16"/></svg>'
            "{} <b>{}</b></span>"
        ).format(number, line.label, unit(line.now))
        for number, line in enumerate(lines)
    )
    said = "; ".join(
        f"{line.label}: now {unit(line.now)}, highest {unit(max(seen, default=math.nan))}"
        for line in lines
        for seen in [[value for value in line.curve.values if not math.isnan(value)]]
    )
    times = lines[0].curve.times
    span = (times[-1] - times[0]) / 60 if times else 0
    body = Markup("").join(_paths(lines, top))
    empty = "" if known else Markup('<p class="nodata">no data yet</p>')
    return Markup(
        '<figure class="chart"><figcaption><span class="title">{title}</span>{legend}</figcaption>'
        '<div class="plot"><span class="top">{top}</span>'
        '<svg viewBox="0 0 600 120" preserveAspectRatio="none" role="img" aria-label="{said}">'
        '<path class="grid" d="M0 1H600M0 60H600M0 119H600"/>{body}</svg>{empty}</div>'
        '<div class="axis"><span>{span} min ago</span><span>now</span></div></figure>'
    ).format(
        title=title,
        legend=legend,
        top=unit(top) if known else UNKNOWN,
        said=f"{title}. {said}",
        body=body,
        empty=empty,
        span=f"{span:.0f}",
    )


def bar(share: float, kind: str = "") -> Markup:
    """Returns a bar filled to `share`, 0 to 1."""
    return Markup(
        '<svg class="bar {}" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="back" width="100" height="6"/><rect class="fill" width="{:.2f}" height="6"/></svg>'
    ).format(kind, 100 * min(1.0, max(0.0, share if share == share else 0.0)))


@dataclass(frozen=True, slots=True)
class Slice:
    """One owner on the ring: its `share` of the keys and its `load`, 0 to 1."""

    label: str
    share: float
    load: float
    healthy: bool


def ring(slices: Sequence[Slice], middle: str, below: str) -> Markup:
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
        parts.append(Markup('<circle class="nobody" r="89"/>'))
    return Markup(
        '<svg class="ring" viewBox="-104 -104 208 208" role="img" aria-label="{label}">{parts}'
        '<text class="middle" y="-2">{middle}</text><text class="below" y="20">{below}</text></svg>'
    ).format(
        label="; ".join(f"{one.label} owns {one.share:.0%} of the keys" for one in slices) or "nobody is in the ring",
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


def _paths(lines: Sequence[Line], top: float) -> Iterator[Markup]:
    for number, line in reversed(list(enumerate(lines))):
        for run in _runs(line.curve):
            points = [(x, _HEIGHT - 1 - (_HEIGHT - 2) * min(1.0, value / top)) for x, value in run]
            d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            if number == 0:
                area = f"{d}L{points[-1][0]:.1f} {_HEIGHT}L{points[0][0]:.1f} {_HEIGHT}Z"
                yield Markup('<path class="area" d="{}"/>').format(area)
            yield Markup('<path class="line k{}" d="{}"/>').format(number, d)


def _runs(curve: Curve) -> Iterator[list[tuple[float, float]]]:
    """Yields the parts of a curve between gaps. A single value becomes a short line."""
    last = max(1, len(curve.values) - 1)
    run: list[tuple[float, float]] = []
    for index, value in enumerate([*curve.values, math.nan]):
        if not math.isnan(value):
            run.append((_WIDTH * index / last, value))
        elif run:
            yield run if len(run) > 1 else [(run[0][0] - 3, run[0][1]), run[0]]
            run = []


def _nice(value: float) -> float:
    """Rounds up to the next of 1, 2, 2.5, 5 and 10, times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * 0.999)
