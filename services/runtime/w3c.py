"""What callers send beside a request to say which trace it belongs to: W3C Trace Context and W3C Baggage."""

from __future__ import annotations  # compiled by mypyc

import random
import re
from typing import NamedTuple
from urllib.parse import unquote

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_MAX_STATE = 512
# As the specification has it.
_MAX_BAGGAGE_BYTES = 8192
_MAX_MEMBERS = 64


class Parent(NamedTuple):
    """The caller's span, and whether it records it. Ids in hexadecimal."""

    trace_id: str
    span_id: str
    sampled: bool


def new_trace_id() -> str:
    """32 hexadecimal digits, not all of them 0."""
    return f"{random.getrandbits(128) or 1:032x}"


def new_span_id() -> str:
    """16 hexadecimal digits, not all of them 0."""
    return f"{random.getrandbits(64) or 1:016x}"


def parse_traceparent(value: str) -> Parent | None:
    """None where it is not one: then a new trace begins."""
    match = _TRACEPARENT.fullmatch(value)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return Parent(trace_id, span_id, bool(int(flags, 16) & 1))


def packed(traceparent: str) -> bytes:
    """The trace id (16 bytes) and the span id (8) of one that was written here; b"" where it is none."""
    try:
        return bytes.fromhex(traceparent[3:35] + traceparent[36:52])
    except ValueError:
        return b""


def traceparent(trace_id: str, span_id: str, sampled: bool) -> str:
    """What to send on, so that `span_id` becomes the parent there."""
    return f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}"


def usable_state(value: str) -> str:
    """A tracestate is passed on as it came, and left out where it is longer than anybody must take."""
    return value if len(value) <= _MAX_STATE else ""


def parse_baggage(value: str) -> dict[str, str]:
    """Members by key, without their properties; what is not well-formed is left out."""
    members: dict[str, str] = {}
    if len(value) > _MAX_BAGGAGE_BYTES:
        return members
    for member in value.split(",")[:_MAX_MEMBERS]:
        key, is_pair, rest = member.partition(";")[0].partition("=")
        if is_pair and _KEY.fullmatch(key := key.strip()):
            members[key] = unquote(rest.strip())
    return members
