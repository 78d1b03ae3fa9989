"""Framing for calls between two Ringmesh processes on one host, over a stream between their event loops.

A frame is the size of its payload (4 bytes), its kind (1) and its call number (4), all big-endian, then the payload.
The caller assigns call numbers, which are valid only during the call. docs/decisions/0023 says why this is not gRPC.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final, cast

from services.runtime.pieces import Pieces

# From the caller: a request, and its cancellation.
CALL: Final = 0
CANCEL: Final = 1
# From the server: a response; a gRPC status code (1 byte) and its message; and, as call 0, that it takes no more calls.
ANSWER: Final = 2
FAILURE: Final = 3
LEAVING: Final = 4
# From the server: part of a large response, whose last part comes as ANSWER.
PART: Final = 5
# Large responses are sent in parts of this size, and other frames are sent between them.
PART_BYTES: Final = 256 << 10

_HEAD: Final = struct.Struct(">IBI")
_HEAD_BYTES: Final = 9


class FrameError(Exception):
    """The other side violates the protocol; the message says how."""


class FrameConnection(asyncio.Protocol):
    """One connection. Subclasses receive each frame by `take`, and the end of the connection by `ended`."""

    def __init__(self, largest: int) -> None:
        """A payload of more than `largest` bytes is dropped and only reported to `too_large`."""
        self._largest = largest
        self.transport: asyncio.Transport | None = None
        # The received pieces of an incomplete frame, their size, and the size of the complete frame.
        self._pieces: list[bytes] = []
        self._held = 0
        self._wanted = 0
        self._skipped = 0
        # Messages sent in parts, round-robin, while the other side reads.
        self._large: deque[_Large] = deque()
        self._is_paused = False
        self._is_sending = False

    def take(self, kind: int, number: int, payload: bytes) -> None:
        """Handles a frame. May raise FrameError."""
        raise NotImplementedError

    def too_large(self, kind: int, number: int, size: int) -> None:
        """Handles a frame whose payload of `size` bytes is above the limit. May raise FrameError."""
        raise NotImplementedError

    def ended(self, why: str) -> None:
        """Handles the end of the connection."""
        raise NotImplementedError

    def send(self, kind: int, number: int, payload: bytes = b"") -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.writelines((_HEAD.pack(len(payload), kind, number), payload))

    def send_pieces(self, kind: int, number: int, pieces: Sequence[bytes]) -> None:
        """Like `send`; `pieces` are not joined."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.writelines((_HEAD.pack(sum([len(piece) for piece in pieces]), kind, number), *pieces))

    def send_large(self, kind: int, number: int, pieces: Sequence[bytes]) -> None:
        """Like `send`, in parts that other frames may interleave; `pieces` are not joined."""
        self._large.append(_Large(kind, number, pieces))
        self._send_parts_soon()

    def drop_large(self, number: int) -> None:
        self._large = deque([large for large in self._large if large.number != number])

    @property
    def is_sending(self) -> bool:
        return bool(self._large)

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._send_parts_soon()

    def _send_parts_soon(self) -> None:
        if self._large and not self._is_paused and not self._is_sending:
            self._is_sending = True
            asyncio.get_running_loop().call_soon(self._send_part)

    def _send_part(self) -> None:
        self._is_sending = False
        if self._large and not self._is_paused:
            large = self._large.popleft()
            pieces = large.pieces
            part = pieces.take(min(PART_BYTES, pieces.left))
            self.send(PART if pieces.left else large.kind, large.number, part)
            if pieces.left:
                self._large.append(large)
            self._send_parts_soon()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._large.clear()
        self.ended(f"the connection ended: {error}" if error else "the connection ended")

    def data_received(self, data: bytes) -> None:
        if self._skipped:
            skipped = min(self._skipped, len(data))
            self._skipped -= skipped
            data = data[skipped:]
        if self._held:
            self._pieces.append(data)
            self._held += len(data)
            if self._held < self._wanted:
                return
            data = b"".join(self._pieces)
            self._pieces.clear()
            self._held = 0
        try:
            self._take_whole(data)
        except FrameError as error:
            if self.transport is not None:
                self.transport.abort()
            self.ended(str(error))

    def _take_whole(self, data: bytes) -> None:
        position = 0
        left = len(data)
        wanted = _HEAD_BYTES
        while left >= _HEAD_BYTES:
            size, kind, number = _HEAD.unpack_from(data, position)
            if size > self._largest:
                self.too_large(kind, number, size)
                came = min(size, left - _HEAD_BYTES)
                self._skipped = size - came
            else:
                wanted = _HEAD_BYTES + size
                if left < wanted:
                    break
                came = size
                self.take(kind, number, data[position + _HEAD_BYTES : position + wanted])
                wanted = _HEAD_BYTES
            position += _HEAD_BYTES + came
            left -= _HEAD_BYTES + came
        if left:
            self._pieces.append(data[position:] if position else data)
            self._held, self._wanted = left, wanted


class _Large:
    """A message sent in parts."""

    def __init__(self, kind: int, number: int, pieces: Sequence[bytes]) -> None:
        self.kind = kind
        self.number = number
        self.pieces = Pieces(pieces)
