"""Looks into an ONNX file for its operators, without the onnx package.

An ONNX file is a protobuf message (onnx/onnx.proto): only what names operators and tensors is walked to, in the
graph, in subgraphs held by attributes, and in functions; weights are skipped over.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

RANDOM_OPERATORS = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)

# Field numbers of onnx.proto: where messages that hold operators lie.
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _FUNCTION = range(5)
_CHILDREN = {
    _MODEL: {7: _GRAPH, 25: _FUNCTION},
    _GRAPH: {1: _NODE},
    _FUNCTION: {7: _NODE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {6: _GRAPH, 11: _GRAPH},
}
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP_TYPE, _NODE_DOMAIN = 1, 2, 4, 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT = 1, 5, 11
_TENSOR_NAME, _VALUE_NAME = 8, 1
_TRAINING_MODE = 2  # the position of that input of Dropout


class Node(NamedTuple):
    """`operator` has its domain in front, unless that is ONNX's own: `com.microsoft.Gelu`. An input may be ""."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Graph(NamedTuple):
    """The main graph. `constants` are the initializers that no request overrides."""

    nodes: tuple[Node, ...]
    constants: frozenset[str]


def random_operators(model: Path) -> list[str]:
    """The operators of the file that draw random numbers, by name. Raises ValueError where it is not a protobuf."""
    with _mapped(model) as data:
        found = set()
        for node in _nodes(data, 0, len(data), _MODEL):
            if node.operator in RANDOM_OPERATORS:
                found.add(node.operator)
            elif node.operator == "Dropout" and any(node.inputs[_TRAINING_MODE:]):
                # Its value may be computed, so that it is given at all counts: a model not cached for nothing answers
                # right.
                found.add("Dropout with training_mode")
        return sorted(found)


def operator_types(model: Path) -> frozenset[str]:
    """As Node.operator, of all nodes, those of subgraphs and functions included. Raises ValueError."""
    with _mapped(model) as data:
        return frozenset(node.operator for node in _nodes(data, 0, len(data), _MODEL))


def main_graph(model: Path) -> Graph:
    """The nodes of the file's graph, without those of subgraphs and functions. Raises ValueError."""
    with _mapped(model) as data:
        nodes: list[Node] = []
        initializers: set[str] = set()
        inputs: set[str] = set()
        graphs = [place for field, *place in _fields(data, 0, len(data)) if _CHILDREN[_MODEL].get(field) == _GRAPH]
        for start, end in graphs:
            for field, first, last in _fields(data, start, end):
                if field == _GRAPH_NODE:
                    nodes.append(_node(data, first, last))
                elif field == _GRAPH_INITIALIZER:
                    initializers.update(_texts(data, first, last, _TENSOR_NAME))
                elif field == _GRAPH_INPUT:
                    inputs.update(_texts(data, first, last, _VALUE_NAME))
        return Graph(tuple(nodes), frozenset(initializers - inputs))


@contextmanager
def _mapped(model: Path) -> Iterator[mmap.mmap]:
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _nodes(data: mmap.mmap, start: int, end: int, message: int) -> Iterator[Node]:
    """Every node in the message, at any depth."""
    if message == _NODE:
        yield _node(data, start, end)
    for field, first, last in _fields(data, start, end):
        if field in _CHILDREN[message]:
            yield from _nodes(data, first, last, _CHILDREN[message][field])


def _node(data: mmap.mmap, start: int, end: int) -> Node:
    domain = "".join(_texts(data, start, end, _NODE_DOMAIN))
    name = "".join(_texts(data, start, end, _NODE_OP_TYPE))
    inputs, outputs = (tuple(_texts(data, start, end, field)) for field in (_NODE_INPUT, _NODE_OUTPUT))
    return Node(name if domain in ("", "ai.onnx") else f"{domain}.{name}", inputs, outputs)


def _texts(data: mmap.mmap, start: int, end: int, wanted: int) -> Iterator[str]:
    for field, first, last in _fields(data, start, end):
        if field == wanted:
            yield data[first:last].decode("utf-8", "replace")


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of each length-delimited field of the message."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        wire_type = tag & 7
        if wire_type == 0:
            _, position = _varint(data, position, end)
        elif wire_type == 1:
            position += 8
        elif wire_type == 5:
            position += 4
        elif wire_type == 2:
            size, position = _varint(data, position, end)
            if position + size > end:
                raise ValueError("a field ends beyond its message")
            yield tag >> 3, position, position + size
            position += size
        else:
            raise ValueError(f"wire type {wire_type}")


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("a number without an end")
