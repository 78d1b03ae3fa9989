"""Results apart from their responses, which protobuf never holds; together they travel in ExecuteResponse.

It would copy each several times, with the GIL held: services/runtime/large_bytes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from ringmesh.inference.v1 import inference_pb2

from services.runtime import wire

# An envelope of as many smaller ones as it may have is serialized in a few milliseconds.
LARGE_RESPONSE_BYTES = 256 << 10
_RESULTS, _LOAD = 1, 2
_RESPONSE = 1
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


class SplitResult:
    """A WorkResult without its response, which stands beside it; b"" where it failed.

    It is made of a message or of a serialized one, which is parsed when somebody asks.
    """

    __slots__ = ("_message", "response", "serialized")

    def __init__(self, message: inference_pb2.WorkResult | None, response: bytes, serialized: bytes = b"") -> None:
        self._message = message
        self.response = response
        self.serialized = serialized

    @property
    def message(self) -> inference_pb2.WorkResult:
        """All but the response."""
        if self._message is None:
            self._message = inference_pb2.WorkResult.FromString(self.serialized)
        return self._message

    @property
    def timing(self) -> inference_pb2.Timing:
        """As of the message."""
        return self.message.timing

    @property
    def model_digest(self) -> bytes:
        """As of the message."""
        return self.message.model_digest

    @property
    def failure(self) -> inference_pb2.Failure:
        """As of the message."""
        return self.message.failure

    def HasField(self, name: str) -> bool:  # noqa: N802, as of the message
        """As of the message."""
        return self.message.HasField(name)  # type: ignore[arg-type]


Result: TypeAlias = inference_pb2.WorkResult | SplitResult


class LargeAnswer(NamedTuple):
    """A serialized ExecuteResponse without its responses, and these: one for each result, b"" where it has none."""

    message: bytes
    responses: list[bytes]

    def results(self, parsed: inference_pb2.ExecuteResponse) -> list[Result]:
        """What `message` says, as `parsed`, with the responses."""
        return [
            SplitResult(result, response) if response else result
            for result, response in zip(parsed.results, self.responses, strict=True)
        ]


def message_of(result: Result) -> inference_pb2.WorkResult:
    """All that it says but for its response."""
    return result.message if isinstance(result, SplitResult) else result


def pieces_of(results: Sequence[SplitResult], load: inference_pb2.LoadReport) -> list[bytes]:
    """The serialized ExecuteResponse, in pieces; responses are pieces of their own."""
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
    """Of a serialized ExecuteResponse that came in pieces; on a thread. Raises ValueError where it is none."""
    reader = _Reader(pieces)
    message: list[bytes] = []
    responses: list[bytes] = []
    while reader.position < reader.size:
        tag = reader.varint()
        if tag != _RESULTS << 3 | _LENGTH_DELIMITED:
            message += [wire.varint(tag), reader.value(tag)]
            continue
        length = reader.varint()
        end = reader.position + length
        rest: list[bytes] = []
        response = b""
        while reader.position < end:
            tag = reader.varint()
            if tag == _RESPONSE << 3 | _LENGTH_DELIMITED:
                response = reader.take(reader.varint())
            else:
                rest += [wire.varint(tag), reader.value(tag)]
        if reader.position != end:
            raise ValueError("a field ends beyond its message")
        message.append(wire.field(_RESULTS, b"".join(rest)))
        responses.append(response)
    return LargeAnswer(b"".join(message), responses)


class _Reader:
    """Reads bytes that lie in pieces, front to back."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._index = 0
        self._offset = 0
        self.position = 0
        self.size = sum([len(piece) for piece in pieces])

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise ValueError("a field ends beyond its message")
        self.position += count
        taken: list[bytes] = []
        while count:
            piece = self._pieces[self._index]
            left = len(piece) - self._offset
            if count >= left:
                taken.append(piece[self._offset :] if self._offset else piece)
                count -= left
                self._index, self._offset = self._index + 1, 0
            else:
                taken.append(piece[self._offset : self._offset + count])
                self._offset += count
                count = 0
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def varint(self) -> int:
        number = shift = 0
        while shift < 64:
            (byte,) = self.take(1)
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7
        raise ValueError("a number without an end")

    def value(self, tag: int) -> bytes:
        """What follows a tag, as it stands there."""
        kind = tag & 7
        if kind == _VARINT:
            return wire.varint(self.varint())
        if kind == _LENGTH_DELIMITED:
            length = self.varint()
            return wire.varint(length) + self.take(length)
        if kind in (_FIXED64, _FIXED32):
            return self.take(8 if kind == _FIXED64 else 4)
        raise ValueError(f"wire type {kind}")
