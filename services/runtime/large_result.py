"""Worker results whose large responses stay outside protobuf; both travel together in an ExecuteResponse.

Protobuf would copy each response several times, with the GIL held: see services/runtime/large_bytes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from ringmesh.inference.v1 import inference_pb2

from services.runtime import wire
from services.runtime.pieces import Pieces

# Responses from this size are split off. A full envelope of smaller ones is serialized in a few milliseconds.
LARGE_RESPONSE_BYTES = 256 << 10
_RESULTS, _LOAD = 1, 2
_RESPONSE = 1
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


class SplitResult:
    """A WorkResult and, separately, its response; b"" if the work failed.

    It is built from a message, or from a serialized message that is parsed on first access.
    """

    __slots__ = ("_message", "response", "serialized")

    def __init__(self, message: inference_pb2.WorkResult | None, response: bytes, serialized: bytes = b"") -> None:
        self._message = message
        self.response = response
        self.serialized = serialized

    @property
    def message(self) -> inference_pb2.WorkResult:
        if self._message is None:
            self._message = inference_pb2.WorkResult.FromString(self.serialized)
        return self._message

    @property
    def timing(self) -> inference_pb2.Timing:
        return self.message.timing

    @property
    def model_digest(self) -> bytes:
        return self.message.model_digest

    @property
    def failure(self) -> inference_pb2.Failure:
        return self.message.failure

    def HasField(self, name: str) -> bool:  # noqa: N802, as of the message
        return self.message.HasField(name)  # type: ignore[arg-type]


Result: TypeAlias = inference_pb2.WorkResult | SplitResult


class LargeAnswer(NamedTuple):
    """A serialized ExecuteResponse without its responses, and the responses: one for each result, or b"" for none."""

    message: bytes
    responses: list[bytes]

    def results(self, parsed: inference_pb2.ExecuteResponse) -> list[Result]:
        """Returns the results of `parsed`, which is the parsed `message`, with their responses."""
        return [
            SplitResult(result, response) if response else result
            for result, response in zip(parsed.results, self.responses, strict=True)
        ]


def message_of(result: Result) -> inference_pb2.WorkResult:
    """Returns the result as a message, without a response that was split off."""
    return result.message if isinstance(result, SplitResult) else result


def pieces_of(results: Sequence[SplitResult], load: inference_pb2.LoadReport) -> list[bytes]:
    """Serializes an ExecuteResponse in pieces; each response is a piece of its own."""
    pieces: list[bytes] = []
    for result in results:
        rest = result.serialized or result.message.SerializeToString()
        if response := result.response:
            head = wire.head(_RESPONSE, len(response))
            pieces += (wire.head(_RESULTS, len(head) + len(response) + len(rest)), head, response, rest)
        else:
            pieces.append(wire.field(_RESULTS, rest))
    pieces.append(wire.field(_LOAD, load.SerializeToString()))
    return pieces


def take_apart(pieces: Sequence[bytes]) -> LargeAnswer:
    """Splits a serialized ExecuteResponse that came in pieces. Call it on a thread. Raises ValueError if malformed."""
    reader = Pieces(pieces)
    message: list[bytes] = []
    responses: list[bytes] = []
    while reader.left:
        tag = _varint(reader)
        if tag != _RESULTS << 3 | _LENGTH_DELIMITED:
            message += [wire.varint(tag), _value(reader, tag)]
            continue
        length = _varint(reader)
        end = reader.left - length
        rest: list[bytes] = []
        response = b""
        while reader.left > end:
            tag = _varint(reader)
            if tag == _RESPONSE << 3 | _LENGTH_DELIMITED:
                response = reader.take(_varint(reader))
            else:
                rest += [wire.varint(tag), _value(reader, tag)]
        if reader.left != end:
            raise ValueError("a field ends beyond its message")
        message.append(wire.field(_RESULTS, b"".join(rest)))
        responses.append(response)
    return LargeAnswer(b"".join(message), responses)


def _varint(reader: Pieces) -> int:
    number = shift = 0
    while shift < 64:
        (byte,) = reader.take(1)
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number
        shift += 7
    raise ValueError("a number without an end")


def _value(reader: Pieces, tag: int) -> bytes:
    """The value after `tag`, as it is encoded."""
    kind = tag & 7
    if kind == _VARINT:
        return wire.varint(_varint(reader))
    if kind == _LENGTH_DELIMITED:
        length = _varint(reader)
        return wire.varint(length) + reader.take(length)
    if kind in (_FIXED64, _FIXED32):
        return reader.take(8 if kind == _FIXED64 else 4)
    raise ValueError(f"wire type {kind}")
