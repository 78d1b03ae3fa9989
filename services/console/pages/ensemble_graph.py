"""Draws an ensemble as a graph: its inputs on the left, then its steps, then its outputs, joined by tensors."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from markupsafe import Markup
from ringmesh.oip.v2 import model_config_pb2

_WIDTH, _HEIGHT = 150, 40
_ACROSS, _DOWN = 230, 62


@dataclass(frozen=True, slots=True)
class _Node:
    """A box. `reads` and `writes` are names of tensors of the ensemble. `model` is "" for inputs and outputs."""

    label: str
    model: str
    reads: frozenset[str]
    writes: frozenset[str]


def draw(config: model_config_pb2.ModelConfig) -> Markup:
    """Returns the graph as SVG; "" for a model that is not an ensemble."""
    steps = config.ensemble_scheduling.step
    if not steps:
        return Markup("")
    nodes = [
        *(_Node(tensor.name, "", frozenset(), frozenset([tensor.name])) for tensor in config.input),
        *(
            _Node(
                step.model_name,
                step.model_name,
                frozenset(step.input_map.values()),
                frozenset(step.output_map.values()),
            )
            for step in steps
        ),
    ]
    columns = _columns(nodes)
    nodes += [_Node(tensor.name, "", frozenset([tensor.name]), frozenset()) for tensor in config.output]
    columns += [max(columns) + 1] * len(config.output)
    rows = [columns[:index].count(column) for index, column in enumerate(columns)]
    corners = [(column * _ACROSS, row * _DOWN) for column, row in zip(columns, rows, strict=True)]
    edges = [
        Markup('<path d="M{} {}C{} {} {} {} {} {}"/><text class="tensor" x="{}" y="{}">{}</text>').format(
            x + _WIDTH, y + 20, x + _WIDTH + 40, y + 20, to_x - 40, to_y + 20, to_x, to_y + 20,
            (x + _WIDTH + to_x) / 2, (y + to_y) / 2 + 14, ", ".join(sorted(shared)),
        )
        for source, (x, y) in zip(nodes, corners, strict=True)
        for target, (to_x, to_y) in zip(nodes, corners, strict=True)
        if (shared := source.writes & target.reads)
    ]  # fmt: skip
    boxes = [_box(node, x, y) for node, (x, y) in zip(nodes, corners, strict=True)]
    labels = ", ".join(step.model_name for step in steps)
    return Markup(
        '<svg class="graph" viewBox="-2 -2 {} {}" width="{}" role="img" aria-label="Ensemble of {}">{}{}</svg>'
    ).format(
        max(columns) * _ACROSS + _WIDTH + 4,
        (max(rows) + 1) * _DOWN - (_DOWN - _HEIGHT) + 4,
        max(columns) * _ACROSS + _WIDTH + 4,
        labels,
        Markup("").join(edges),
        Markup("").join(boxes),
    )


def _columns(nodes: list[_Node]) -> list[int]:
    """Returns the column of each node: one more than the last column that it reads from."""
    columns = [0] * len(nodes)
    # One round per possible column, so that a cycle ends too.
    for _ in nodes:
        for index, node in enumerate(nodes):
            before = [columns[other] for other, source in enumerate(nodes) if source.writes & node.reads]
            columns[index] = min(len(nodes), max(before, default=-1) + 1)
    return columns


def _box(node: _Node, x: float, y: float) -> Markup:
    label = node.label if len(node.label) <= 18 else f"{node.label[:17]}…"
    box = Markup(
        '<g class="{}"><title>{}</title><rect x="{}" y="{}" width="{}" height="{}" rx="8"/>'
        '<text x="{}" y="{}">{}</text></g>'
    ).format("step" if node.model else "end", node.label, x, y, _WIDTH, _HEIGHT, x + _WIDTH / 2, y + 25, label)
    return Markup('<a href="/models/{}">{}</a>').format(quote(node.model), box) if node.model else box
