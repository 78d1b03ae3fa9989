"""The trace headers of a request: W3C Trace Context and W3C Baggage."""

from __future__ import annotations  # compiled by mypyc

import random
import re
from typing import NamedTuple
from urllib.parse import unquote

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_MAX_STATE = 512
_PACKED_BYTES = 24
# Limits of the W3C Baggage specification.
_MAX_BAGGAGE_BYTES = 8192
_MAX_MEMBERS = 64


class Parent(NamedTuple):
    """The caller's span, and whether the caller samples it. Ids in hexadecimal."""

    trace_id: str
    span_id: str
    sampled: bool


def new_trace_id() -> str:
    """32 hexadecimal digits, not all of them 0."""
    return _hexadecimal(16)


def new_span_id() -> str:
    """16 hexadecimal digits, not all of them 0."""
    return _hexadecimal(8)


def _hexadecimal(size: int) -> str:
    # Each request takes one or two; a format specification would take four times as long.
    return (random.getrandbits(8 * size) or 1).to_bytes(size, "big").hex()


def parse_traceparent(value: str) -> Parent | None:
    """Returns None if `value` is malformed; a new trace begins then."""
    match = _TRACEPARENT.fullmatch(value)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return Parent(trace_id, span_id, bool(int(flags, 16) & 1))


def packed(traceparent: str) -> bytes:
    """Returns the trace id (16 bytes) and span id (8) of a traceparent made by `traceparent`; b"" if malformed."""
    try:
        ids = bytes.fromhex(traceparent[3:35] + traceparent[36:52])
    except ValueError:
        return b""
    return ids if len(ids) == _PACKED_BYTES else b""


def traceparent(trace_id: str, span_id: str, sampled: bool) -> str:
    return f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}"


def usable_state(value: str) -> str:
    """Returns the tracestate unchanged, or "" if it is longer than receivers are required to accept."""
    return value if len(value) <= _MAX_STATE else ""


def parse_baggage(value: str) -> dict[str, str]:
    """Returns the members by key, without their properties; malformed members are left out."""
    members: dict[str, str] = {}
    if len(value) > _MAX_BAGGAGE_BYTES:
        return members
    for member in value.split(",")[:_MAX_MEMBERS]:
        key, is_pair, rest = member.partition(";")[0].partition("=")
        if is_pair and _KEY.fullmatch(key := key.strip()):
            members[key] = unquote(rest.strip())
    return members
