"""A span as a plain record, and its serialized forms: OTLP bytes, or a line of JSON."""

from __future__ import annotations  # compiled by mypyc

import json
import os
import socket
import struct
from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from opentelemetry.proto.trace.v1 import trace_pb2

from services.runtime import wire
from services.runtime.errors import CODE_NAMES

Value: TypeAlias = str | int | float | bool
Attributes: TypeAlias = Mapping[str, Value]

# The field `flags`: 0x1 sampled, 0x100 whether the parent is remote is known, 0x200 the parent is remote.
_LOCAL_PARENT = b"\x85\x01" + (0x101).to_bytes(4, "little")
_REMOTE_PARENT = b"\x85\x01" + (0x301).to_bytes(4, "little")
_TIMES = struct.Struct("<BQBQ")
_TIME = struct.Struct("<BQ")
_DOUBLE = struct.Struct("<BBBd")
_64_BITS = (1 << 64) - 1
# Texts up to this length stay encoded. Callers may send longer ones, such as the name of a model that does not exist.
_KEPT_LETTERS = 256
# json.dumps would make an encoder for each span.
_to_json = json.JSONEncoder(separators=(",", ":")).encode


class Kind(StrEnum):
    """The kind of a span."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"


class Process(NamedTuple):
    """The process of a span: `service.name` without its prefix, and `service.instance.id`."""

    service: str
    instance: str


def this_process(service: str) -> Process:
    return Process(service, f"{socket.gethostname()}:{os.getpid()}")


class Event(NamedTuple):
    """An event at one moment of a span."""

    name: str
    at_ns: int
    attributes: Attributes


class SharedAttributes:
    """Attributes that many spans have in common, encoded once."""

    def __init__(self, attributes: Attributes) -> None:
        self.attributes = attributes
        self.otlp = b"".join([_attribute(key, value) for key, value in attributes.items()])


class Span:
    """Ids in hexadecimal, `parent_id` "" at a root; times in ns since the Unix epoch; `error` "" on success.

    It has the attributes `shared` and `attributes`. `links` are spans of other traces, as (trace id, span id).
    """

    def __init__(
        self,
        process: Process,
        trace_id: str,
        span_id: str,
        parent_id: str,
        name: str,
        kind: Kind,
        start_ns: int,
        end_ns: int,
        attributes: Attributes,
        error: str = "",
        trace_state: str = "",
        events: tuple[Event, ...] = (),
        links: tuple[tuple[str, str], ...] = (),
        shared: SharedAttributes | None = None,
    ) -> None:
        self.process = process
        self.trace_id = trace_id
        self.span_id = span_id
        self.parent_id = parent_id
        self.name = name
        self.kind = kind
        self.start_ns = start_ns
        self.end_ns = end_ns
        self.attributes = attributes
        self.error = error
        self.trace_state = trace_state
        self.events = events
        self.links = links
        self.shared = shared

    def to_otlp(self) -> bytes:
        # Built by hand because this runs for every traced request: through a message it takes twice as long.
        parts = [
            b"\x0a\x10",  # trace_id
            bytes.fromhex(self.trace_id),
            b"\x12\x08",  # span_id
            bytes.fromhex(self.span_id),
            _LOCAL_PARENT if self.kind is not Kind.SERVER else _REMOTE_PARENT,
            _head(self.name, self.kind),
            _TIMES.pack(0x39, self.start_ns, 0x41, self.end_ns),  # start_time_unix_nano, end_time_unix_nano
        ]
        if self.parent_id:
            parts += b"\x22\x08", bytes.fromhex(self.parent_id)
        if self.trace_state:
            parts.append(wire.field(3, self.trace_state.encode()))
        if self.shared is not None:
            parts.append(self.shared.otlp)
        for key, value in self.attributes.items():
            parts.append(_attribute(key, value))
        for event in self.events:
            attributes = [wire.field(3, _key_value(key, value)) for key, value in event.attributes.items()]
            head = _TIME.pack(0x09, event.at_ns) + wire.field(2, event.name.encode())
            parts.append(wire.field(11, head + b"".join(attributes)))
        for trace_id, span_id in self.links:
            link = wire.field(1, bytes.fromhex(trace_id)) + wire.field(2, bytes.fromhex(span_id))
            parts.append(wire.field(13, link))
        if self.error:
            parts.append(wire.field(15, wire.field(2, self.error.encode()) + b"\x18\x02"))  # STATUS_CODE_ERROR
        return b"".join(parts)

    def to_json(self) -> str:
        """Returns one line in the format that `ringmesh trace` reads."""
        fields = {
            "trace_id": self.trace_id,
            "span_id": self.span_id,
            "parent_id": self.parent_id,
            "service": f"ringmesh-{self.process.service}",
            "instance": self.process.instance,
            "name": self.name,
            "kind": self.kind.value,
            "start_ns": self.start_ns,
            "end_ns": self.end_ns,
            "error": self.error,
            "attributes": {**(self.shared.attributes if self.shared is not None else {}), **self.attributes},
            "events": [event._asdict() for event in self.events],
            "links": self.links,
        }
        return _to_json(fields)


def rpc_attributes(method: str, code: int) -> dict[str, Value]:
    """Attributes by the semantic conventions for RPC (1.45). `method`: its full name; `code`: a google.rpc.Code."""
    name = CODE_NAMES.get(code, "UNKNOWN")
    attributes: dict[str, Value] = {
        "rpc.system.name": "grpc",
        "rpc.method": method,
        "rpc.response.status_code": name,
    }
    if code:
        attributes["error.type"] = name
    return attributes


def resource(process: Process) -> bytes:
    attributes = {"service.name": f"ringmesh-{process.service}", "service.instance.id": process.instance}
    return b"".join(wire.field(1, _key_value(*pair)) for pair in attributes.items())


@lru_cache(1024)
def _head(name: str, kind: Kind) -> bytes:
    return wire.field(5, name.encode()) + bytes((0x30, trace_pb2.Span.SpanKind.Value(f"SPAN_KIND_{kind.name}")))


def _attribute(key: str, value: Value) -> bytes:
    return wire.field(9, _key_value(key, value))


def _key_value(key: str, value: Value) -> bytes:
    # Numbers and cache keys differ by request, and building messages took 6 us.
    if isinstance(value, str):
        return _text(key, value) if len(value) <= _KEPT_LETTERS else _encoded_text(key, value)
    if isinstance(value, bool):
        packed = b"\x12\x02\x10\x01" if value else b"\x12\x02\x10\x00"
    elif isinstance(value, int):
        packed = wire.field(2, b"\x18" + wire.varint(value & _64_BITS))
    else:
        packed = _DOUBLE.pack(0x12, 9, 0x21, value)
    return _key(key) + packed


@lru_cache(4096)
def _text(key: str, value: str) -> bytes:
    return _encoded_text(key, value)


def _encoded_text(key: str, value: str) -> bytes:
    return _key(key) + wire.field(2, wire.field(1, value.encode()))


@lru_cache(1024)
def _key(key: str) -> bytes:
    return wire.field(1, key.encode())
