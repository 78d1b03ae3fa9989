"""Looks into an ONNX file for operators whose answers do not repeat, without the onnx package.

An ONNX file is a protobuf message (onnx/onnx.proto): only the operators' names and inputs are walked to, in the
graph, in subgraphs held by attributes, and in functions; weights are skipped over.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

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
_INPUT = 1
_OP_TYPE = 4
_TRAINING_MODE = 2  # the position of that input of Dropout


def random_operators(model: Path) -> list[str]:
    """The operators of the file that draw random numbers, by name. Raises ValueError where it is not a protobuf."""
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return sorted(set(_random(data, 0, len(data), _MODEL)))


def _random(data: mmap.mmap, start: int, end: int, message: int) -> Iterator[str]:
    operator = b""
    inputs: list[bytes] = []
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
            field = tag >> 3
            if message == _NODE and field == _OP_TYPE:
                operator = data[position : position + size]
            elif message == _NODE and field == _INPUT:
                inputs.append(data[position : position + size])
            elif field in _CHILDREN[message]:
                yield from _random(data, position, position + size, _CHILDREN[message][field])
            position += size
        else:
            raise ValueError(f"wire type {wire_type}")
    name = operator.decode("utf-8", "replace")
    if name in RANDOM_OPERATORS:
        yield name
    elif name == "Dropout" and any(inputs[_TRAINING_MODE:]):
        # Its value may be computed, so that it is given at all counts: a model not cached for nothing answers right.
        yield "Dropout with training_mode"


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
