"""One connection of a gRPC server: HTTP/2 (RFC 9113) on the event loop.

A chunk that the kernel hands over holds many requests of a busy connection. All of them are read, the calls that need
no waiting are answered, and their answers leave in one write. docs/decisions/0032 has the measurement.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol, cast
from urllib.parse import quote

import grpc
from mypy_extensions import i64  # compiled: fields of frames and counts of bytes

from services.runtime import faults
from services.runtime.large_bytes import LARGE_BYTES
from services.runtime.rpc import http2_frames as h2
from services.runtime.rpc.header_blocks import HeaderDecoder
from services.runtime.rpc.request_head import ANSWER, HEADERS, NOT_GRPC, RequestHead, failed
from services.runtime.rpc.request_messages import PREFIX_BYTES, Messages, inflated
from services.runtime.rpc.rpc import Metadata

log = logging.getLogger(__name__)

_PREFACE_SECONDS: Final = 20.0

_LARGEST_FRAME: Final = (1 << 24) - 1
# What a client may send on a stream before it is given more. A message that is longer gets room for all of it.
_STREAM_WINDOW: Final = 1 << 20
# Bytes received on the connection before it is given as many more.
_CONNECTION_STEP: Final = 1 << 29
_FRAME_BYTES: Final = 65_536
# A data frame is taken before its end has come if so much of it is there.
_PART_BYTES: Final = 4096
# The socket's queue above which no more data of streams is added.
_WRITE_BYTES: Final = 1 << 20
# The same for what is not data of streams: a client that asks for it and reads nothing is cut.
_MOST_WRITE_BYTES: Final = 16 << 20
# Frames that leave in one write.
_WRITE_FRAMES: Final = 8
# Encoded bytes and frames of one header block, and the metadata beyond the limit that one connection may send, as a
# multiple of that limit.
_BLOCK_BYTES: Final = 2 << 20
_BLOCK_FRAMES: Final = 256
_EXCESS: Final = 256
# Requests whose headers are remembered, and the longest encoded ones.
_KEPT_HEADS: Final = 64
_KEPT_HEAD_BYTES: Final = 4096
# Of an unknown method, in the message that says so; and of the reason for the end of a connection.
_PATH_LETTERS: Final = 200
_REASON_LETTERS: Final = 100
# Of one frame: each may change the window of every stream.
_MOST_SETTINGS: Final = 32
# Parts of a message that are shorter are joined as they come: an object takes more than its few bytes.
_SMALL_PART: Final = 1024
# How long a connection that ends may take to send what it has left.
_CLOSE_SECONDS: Final = 5.0

# Of one stream, in one turn of the event loop; and what may wait of a streamed answer before more is made.
_TURN_BYTES: Final = 256 << 10
UNSENT_BYTES: Final = 64 << 10

_PREFIX: Final = struct.Struct(">BI")
_FIRST: Final = struct.Struct(f">BHBBI{len(ANSWER)}sBHBBIBI")


class Server(Protocol):
    """What a connection needs of its server. All calls are made on the event loop."""

    max_message_bytes: int
    max_metadata_bytes: int
    max_streams: int
    # Of requests that came in parts, of calls that have not ended; and their limit.
    request_bytes: int
    max_request_bytes: int

    def head(self, fields: list[tuple[bytes, bytes]], size: int) -> RequestHead[Any]:
        """Reads headers and finds the method."""

    def begin(self, stream: Stream, message: bytes) -> None:
        """A call has come: with its message, or with b"" if it is a stream of messages."""

    def turn_over(self) -> None:
        """All calls of a chunk have begun, and their answers are on their way."""

    def opened(self, connection: Connection) -> None:
        """A client has connected."""

    def lost(self, connection: Connection) -> None:
        """The connection is over; its streams were cancelled."""


class Stream:
    """One call. `head` says what it asks for."""

    def __init__(self, connection: Connection, number: int, head: RequestHead[Any], window: int) -> None:
        self.connection = connection
        self.number = number
        self.head = head
        # In time.monotonic; it counts from the headers. None: none.
        self.deadline: float | None = None if head.timeout is None else time.monotonic() + head.timeout
        # Called if the client leaves. None: the call has not begun.
        self.cancel: Callable[[], object] | None = None
        # Whether no more is sent or received on it.
        self.is_closed = False
        # Whether the client has sent all, and whether headers were sent to it.
        self.is_received = False
        self.is_open = False
        # Bytes that the client may send, and those that it takes.
        self.room: i64 = _STREAM_WINDOW
        self.window: i64 = window
        # Received parts of a message that is not complete; `length` is its length with the prefix, -1 before that.
        self.parts: list[bytes] = []
        self.size: i64 = 0
        self.length: i64 = -1
        # Bytes of it that `request_bytes` of the server counts.
        self.held: i64 = 0
        self.is_compressed = False
        self.has_message = False
        self.messages: Messages | None = None
        # What waits for room in the window or in the socket's queue, and the trailers that follow it.
        self.unsent: deque[bytes | memoryview] = deque()
        self.unsent_bytes: i64 = 0
        self.trailers: bytes | None = None
        # Set when `unsent_bytes` has become small, or the stream has closed.
        self.drained: asyncio.Future[None] | None = None


class Connection(asyncio.Protocol):
    """The server's end of one connection."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self.peer = ""
        # The start of a frame, or of the preface, that is not complete.
        self._rest: bytes = b""
        self._has_begun = False
        self._timer: asyncio.TimerHandle | None = None
        self._streams: dict[int, Stream] = {}
        self._last_number: i64 = 0
        self._decoder = HeaderDecoder(server.max_metadata_bytes)
        # By header block, for the current table of the decoder.
        self._heads: dict[bytes, RequestHead[Any]] = {}
        self._excess: i64 = 0
        # A header block whose end has not come, and the flags and stream of its first frame.
        self._block: list[bytes] = []
        self._block_bytes: i64 = 0
        self._block_flags: i64 = 0
        self._block_number: i64 = 0
        # Of a data frame that is in part in the next chunk: the bytes that are missing, its flags and stream.
        self._part_left: i64 = 0
        self._part_flags: i64 = 0
        self._part_number: i64 = 0
        self._received: i64 = 0
        # What the client takes: on the connection, on a new stream, in a frame.
        self._window: i64 = h2.DEFAULT_WINDOW
        self._stream_window: i64 = h2.DEFAULT_WINDOW
        self._frame_size: i64 = h2.DEFAULT_FRAME
        self._out: list[bytes | memoryview] = []
        # Bytes of `_out`.
        self._pending: i64 = 0
        # Whether `_out` is written at the end of the current chunk, or by a callback.
        self._is_reading = False
        self._is_flushing = False
        self._is_paused = False
        self._is_sending_soon = False
        self._is_leaving = False
        self._is_closing = False
        # Bytes that came after that.
        self.ignored: i64 = 0
        # Bytes of streams that wait, and all bytes given to the socket.
        self._unsent: i64 = 0
        self._written: i64 = 0
        self._blocked: dict[int, Stream] = {}

    # The transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = made = cast("asyncio.Transport", transport)
        made.set_write_buffer_limits(high=_WRITE_BYTES)
        self.peer = _peer(made.get_extra_info("peername"))
        self._write(
            h2.opening(
                (
                    (h2.MAX_CONCURRENT_STREAMS, self._server.max_streams),
                    (h2.INITIAL_WINDOW_SIZE, _STREAM_WINDOW),
                    (h2.MAX_FRAME_SIZE, _FRAME_BYTES),
                )
            )
        )
        self._timer = asyncio.get_running_loop().call_later(_PREFACE_SECONDS, self.abort)
        self._server.opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._drop_timer()
        for stream in list(self._streams.values()):
            self._close(stream, is_cancelled=True)
        self._out.clear()
        self._pending = 0
        # A call that goes on for a while keeps its connection.
        self._rest = b""
        self._block.clear()
        self._heads.clear()
        self._server.lost(self)

    def eof_received(self) -> None:
        """The client sends no more: it has left, or is about to."""
        self.close()

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._send_blocked()

    @property
    def unsent(self) -> int:
        """Bytes that the client has not taken."""
        transport = self._transport
        return self._unsent + self._pending + (0 if transport is None else transport.get_write_buffer_size())

    @property
    def sent(self) -> int:
        """Bytes that the kernel has taken since the start."""
        transport = self._transport
        return self._written - (0 if transport is None else transport.get_write_buffer_size())

    @property
    def is_busy(self) -> bool:
        """Whether a call is on its way here, under way, or its answer not sent."""
        return bool(self._streams) or self.unsent > 0

    @property
    def is_asked(self) -> bool:
        """Whether the client was asked to leave."""
        return self._is_leaving

    def go_away(self) -> None:
        """Asks the client to make its next calls on another connection."""
        self._is_leaving = True
        self._write(h2.goaway(h2.MAX, h2.NO_ERROR))

    def abort(self) -> None:
        """Ends the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Ends the connection when what was written has left, or after some seconds."""
        if self._transport is not None:
            self._flush()
            self._drop_timer()
            self._timer = asyncio.get_running_loop().call_later(_CLOSE_SECONDS, self.abort)
            self._transport.close()
        self._is_closing = True

    def finish(self) -> None:
        """Sends no more, and leaves it to the client to end the connection when it has read all.

        If this end closed it, what the client sends while it reads, such as WINDOW_UPDATE, would make the kernel drop
        the rest.
        """
        for stream in list(self._streams.values()):
            self._close(stream, is_cancelled=True)
        if self._transport is not None and not self._is_closing and not self._transport.is_closing():
            self._flush()
            self._transport.write_eof()
        self._is_closing = True

    def _drop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _write(self, data: bytes) -> None:
        """Writes `data` soon, with other frames: a system call takes 5 us. Not with too many, or clients wait."""
        self._out.append(data)
        self._pending += len(data)
        if self._is_reading:
            return
        if len(self._out) >= _WRITE_FRAMES:
            self._flush()
        elif not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flushing = False
        if self._out:
            data = b"".join(self._out)
            self._out.clear()
            self._pending = 0
            if self._transport is not None and not (self._is_closing or self._transport.is_closing()):
                self._written += len(data)
                self._transport.write(data)

    def _relieve(self) -> None:
        """Writes, and raises h2.ProtocolError if too much that was written before is not read."""
        self._flush()
        if self._transport is not None and self._transport.get_write_buffer_size() > _MOST_WRITE_BYTES:
            raise h2.ProtocolError(h2.ENHANCE_YOUR_CALM, "nothing that was sent is read")

    # Frames.

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            self.ignored += len(data)
            return
        self._is_reading = True
        try:
            self._take_chunk(data)
            self._relieve()
        except h2.ProtocolError as error:
            self._fail(error.code, str(error))
        except Exception:
            log.exception("a connection failed")
            self._fail(h2.INTERNAL_ERROR, "internal error")
        finally:
            self._is_reading = False
            self._flush()
        self._server.turn_over()

    def _fail(self, code: int, why: str) -> None:
        """Ends the connection with an error."""
        log.debug("%s broke the protocol: %s", self.peer, why)
        self._write(h2.goaway(self._last_number, code, why[:_REASON_LETTERS]))
        self._flush()
        for stream in list(self._streams.values()):
            self._close(stream, is_cancelled=True)
        self.close()

    def _take_chunk(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        at: i64 = 0
        flags: i64 = 0
        size: i64 = len(data)
        if not self._has_begun:
            if not (data.startswith(h2.PREFACE) or h2.PREFACE.startswith(data)):
                raise h2.ProtocolError(h2.PROTOCOL_ERROR, "this is a gRPC server: it speaks HTTP/2 without TLS")
            if size < len(h2.PREFACE) + h2.HEAD_BYTES:
                self._rest = data
                return
            if data[len(h2.PREFACE) + 3] != h2.SETTINGS or data[len(h2.PREFACE) + 4] & h2.ACK:
                raise h2.ProtocolError(h2.PROTOCOL_ERROR, "the first frame has no settings")
            self._has_begun = True
            self._drop_timer()
            at = len(h2.PREFACE)
        if self._part_left:
            at = min(self._part_left, size)
            self._part_left -= at
            flags = self._part_flags & ~h2.END_STREAM if self._part_left else self._part_flags
            self._take_data(data, 0, at, flags, self._part_number)
        while size - at >= h2.HEAD_BYTES:
            length: i64 = (data[at] << 16) | (data[at + 1] << 8) | data[at + 2]
            if length > _FRAME_BYTES:
                raise h2.ProtocolError(h2.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            end: i64 = at + h2.HEAD_BYTES + length
            kind: i64 = data[at + 3]
            if end > size and (kind != h2.DATA or size - at < _PART_BYTES or data[at + 4] & h2.PADDED):
                break
            flags = data[at + 4]
            number: i64 = (data[at + 5] << 24 | data[at + 6] << 16 | data[at + 7] << 8 | data[at + 8]) & h2.MAX
            if self._block_number and (kind != h2.CONTINUATION or number != self._block_number):
                raise h2.ProtocolError(h2.PROTOCOL_ERROR, "another frame between those of a header block")
            at += h2.HEAD_BYTES
            if end > size:
                # As two frames, because to join the chunks would copy both.
                self._part_left = end - size
                self._part_flags = flags
                self._part_number = number
                flags &= ~h2.END_STREAM
                end = size
            if kind == h2.DATA:
                self._take_data(data, at, end, flags, number)
            elif kind == h2.HEADERS:
                self._take_headers(data[at:end], flags, number)
            else:
                self._take_other(kind, data[at:end], flags, number)
            at = end
            if self._pending > _WRITE_BYTES:
                self._relieve()
        if at < size:
            self._rest = data[at:]

    def _take_other(self, kind: i64, payload: bytes, flags: i64, number: i64) -> None:
        if kind == h2.WINDOW_UPDATE:
            self._take_room(payload, number)
        elif kind == h2.RST_STREAM:
            self._take_reset(payload, number)
        elif kind == h2.CONTINUATION:
            if not self._block_number:
                raise h2.ProtocolError(h2.PROTOCOL_ERROR, "a continuation of nothing")
            self._add_block(payload, flags)
        elif kind == h2.SETTINGS:
            self._take_settings(payload, flags, number)
        elif kind == h2.PING:
            if number or len(payload) != 8:
                raise h2.ProtocolError(
                    h2.FRAME_SIZE_ERROR if not number else h2.PROTOCOL_ERROR, "a ping that is not valid"
                )
            if not flags & h2.ACK:
                self._write(h2.frame(h2.PING, h2.ACK, 0, payload))
        elif kind == h2.PUSH_PROMISE:
            raise h2.ProtocolError(h2.PROTOCOL_ERROR, "a client does not push")

    def _take_settings(self, payload: bytes, flags: i64, number: i64) -> None:
        if number or (flags & h2.ACK and payload) or len(payload) % 6:
            raise h2.ProtocolError(h2.PROTOCOL_ERROR if number else h2.FRAME_SIZE_ERROR, "settings that are not valid")
        if flags & h2.ACK:
            return
        if len(payload) > 6 * _MOST_SETTINGS:
            raise h2.ProtocolError(h2.ENHANCE_YOUR_CALM, f"more than {_MOST_SETTINGS} settings in a frame")
        before: i64 = self._stream_window
        for identifier, value in struct.iter_unpack(">HI", payload):
            if identifier == h2.INITIAL_WINDOW_SIZE:
                if value > h2.MAX:
                    raise h2.ProtocolError(h2.FLOW_CONTROL_ERROR, f"a window of {value} bytes")
                self._stream_window = value
            elif identifier == h2.MAX_FRAME_SIZE:
                if not h2.DEFAULT_FRAME <= value <= _LARGEST_FRAME:
                    raise h2.ProtocolError(h2.PROTOCOL_ERROR, f"frames of {value} bytes")
                # A frame is handed to the socket whole.
                self._frame_size = min(value, _TURN_BYTES)
        more: i64 = self._stream_window - before
        if more != 0:
            for stream in self._streams.values():
                stream.window += more
                if stream.window > h2.MAX:
                    raise h2.ProtocolError(h2.FLOW_CONTROL_ERROR, "a window over 2 GiB")
        self._write(h2.frame(h2.SETTINGS, h2.ACK, 0, b""))
        if self._blocked:
            self._send_soon()

    def _take_room(self, payload: bytes, number: i64) -> None:
        if len(payload) != 4:
            raise h2.ProtocolError(h2.FRAME_SIZE_ERROR, "a window update that is not valid")
        size: i64 = h2.NUMBER.unpack(payload)[0] & h2.MAX
        if number == 0:
            self._window += size
            if size == 0 or self._window > h2.MAX:
                raise h2.ProtocolError(
                    h2.FLOW_CONTROL_ERROR if size else h2.PROTOCOL_ERROR, "a window update that is not valid"
                )
            if self._window - size <= 0 and self._blocked:
                self._send_soon()
            return
        stream = self._find(number)
        if stream is None:
            return
        stream.window += size
        if size == 0 or stream.window > h2.MAX:
            self.reset(stream, h2.FLOW_CONTROL_ERROR if size else h2.PROTOCOL_ERROR, is_cancelled=True)
        elif number in self._blocked:
            self._send_soon()

    def _take_reset(self, payload: bytes, number: i64) -> None:
        if len(payload) != 4:
            raise h2.ProtocolError(h2.FRAME_SIZE_ERROR, "a reset that is not valid")
        stream = self._find(number)
        if stream is not None:
            self._close(stream, is_cancelled=True)

    def _find(self, number: i64) -> Stream | None:
        """Returns an open stream; None if it has ended."""
        stream = self._streams.get(number)
        if stream is None and (number > self._last_number or number & 1 == 0):
            raise h2.ProtocolError(h2.PROTOCOL_ERROR, f"there was no stream {number}")
        return stream

    # Requests.

    def _take_headers(self, payload: bytes, flags: i64, number: i64) -> None:
        if number & 1 == 0:
            raise h2.ProtocolError(h2.PROTOCOL_ERROR, f"a request on stream {number}")
        payload = h2.fragment(payload, flags)
        if flags & h2.END_HEADERS:
            self._take_block(payload, flags, number)
        else:
            self._block_number = number
            self._block_flags = flags
            self._add_block(payload, flags)

    def _add_block(self, payload: bytes, flags: i64) -> None:
        self._block.append(payload)
        self._block_bytes += len(payload)
        if self._block_bytes > _BLOCK_BYTES or len(self._block) > _BLOCK_FRAMES:
            raise h2.ProtocolError(h2.ENHANCE_YOUR_CALM, "the headers of a request are too long")
        if flags & h2.END_HEADERS:
            block, number = b"".join(self._block), self._block_number
            self._block.clear()
            self._block_bytes = 0
            self._block_number = 0
            self._take_block(block, self._block_flags, number)

    def _take_block(self, block: bytes, flags: i64, number: i64) -> None:
        head = self._heads.get(block)
        if head is None:
            head = self._read_head(block)
        stream = self._streams.get(number)
        if stream is not None:  # trailers of a request
            if stream.is_received or not flags & h2.END_STREAM:
                self.reset(stream, h2.PROTOCOL_ERROR, is_cancelled=True)
            else:
                self._end_request(stream)
            return
        if number <= self._last_number:
            if not head.path:
                return  # trailers of a request that was answered before they came
            raise h2.ProtocolError(h2.PROTOCOL_ERROR, f"stream {number} comes after stream {self._last_number}")
        self._last_number = number
        if head.is_malformed:
            self._write(h2.reset(number, h2.PROTOCOL_ERROR))
            return
        if len(self._streams) >= self._server.max_streams:
            self._write(h2.reset(number, h2.REFUSED_STREAM))
            return
        stream = Stream(self, number, head, self._stream_window)
        self._streams[number] = stream
        stream.is_received = flags & h2.END_STREAM != 0
        if not head.is_grpc:
            self._write(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, number, NOT_GRPC))
            self._finish(stream)
        elif head.code is not grpc.StatusCode.OK:
            self.fail(stream, head.code, head.message)
        elif head.method is None:
            self.fail(stream, grpc.StatusCode.UNIMPLEMENTED, f"there is no method {head.path[:_PATH_LETTERS]}")
        else:
            if head.method.takes_stream:
                stream.messages = Messages(partial(self.take, stream), self._server.max_message_bytes)
                self._server.begin(stream, b"")
            if stream.is_received and not stream.is_closed:
                self._end_request(stream)

    def _read_head(self, block: bytes) -> RequestHead[Any]:
        decoder = self._decoder
        before = decoder.changes
        fields = decoder.decode(block)
        limit = self._server.max_metadata_bytes
        head = self._server.head(fields, decoder.size)
        if decoder.changes != before or len(self._heads) >= _KEPT_HEADS:
            self._heads.clear()
        if decoder.size > limit:
            head.is_malformed = False
            head.is_grpc = True
            head.refuse(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"the request's metadata has {decoder.size} bytes; {limit} are read"
            )
            self._excess += decoder.size // limit
            if self._excess > _EXCESS:
                raise h2.ProtocolError(h2.ENHANCE_YOUR_CALM, "too much metadata")
        elif decoder.changes == before and len(block) <= _KEPT_HEAD_BYTES:
            self._heads[block] = head
        return head

    def _take_data(self, data: bytes, at: i64, end: i64, flags: i64, number: i64) -> None:
        size: i64 = end - at
        self._received += size
        if self._received > _CONNECTION_STEP:
            self._write(h2.window_update(0, self._received))
            self._received = 0
        stream = self._streams.get(number)
        if stream is None:
            self._find(number)
            return
        if stream.is_received:
            self.reset(stream, h2.STREAM_CLOSED, is_cancelled=True)
            return
        stream.room -= size
        if stream.room < 0:
            self.reset(stream, h2.FLOW_CONTROL_ERROR, is_cancelled=True)
            return
        if flags & h2.PADDED:
            if size == 0 or data[at] >= size:
                raise h2.ProtocolError(h2.PROTOCOL_ERROR, "a frame with more padding than fits")
            end -= data[at]
            at += 1
        is_last = flags & h2.END_STREAM != 0
        if stream.trailers is not None:
            # The answer is complete and waits for room: nothing more is read.
            stream.is_received = is_last
            return
        # As most requests come: in one frame.
        if is_last and stream.size == 0 and stream.messages is None and end - at >= PREFIX_BYTES and data[at] == 0:
            length: i64 = (data[at + 1] << 24) | (data[at + 2] << 16) | (data[at + 3] << 8) | data[at + 4]
            if at + PREFIX_BYTES + length == end and length <= self._server.max_message_bytes:
                stream.is_received = True
                self._server.begin(stream, data[at + PREFIX_BYTES : end])
                return
        if not self._hold(stream, end - at):
            return
        self._add_data(stream, data, at, end)
        if is_last and not stream.is_closed:
            self._end_request(stream)
        elif stream.room < _STREAM_WINDOW // 2 and not stream.is_closed:
            self.grant(stream)

    def _hold(self, stream: Stream, size: i64) -> bool:
        """Counts bytes of a request; False: there are too many of all, and the call was refused."""
        server = self._server
        if server.request_bytes + size > server.max_request_bytes:
            self._refuse(
                stream, grpc.StatusCode.RESOURCE_EXHAUSTED, "the requests under way are too large together; retry later"
            )
            return False
        stream.held += size
        server.request_bytes += size
        return True

    def take(self, stream: Stream, size: int) -> None:
        """The reader of a stream has taken `size` bytes."""
        if not stream.is_closed:
            stream.held -= size
            self._server.request_bytes -= size
            self.grant(stream)

    def _add_data(self, stream: Stream, data: bytes, at: i64, end: i64) -> None:
        """Adds a part of the request's body, and handles the messages that are complete by it."""
        while at < end and not stream.is_closed and stream.trailers is None:
            if stream.has_message and stream.messages is None:
                self._refuse(stream, grpc.StatusCode.INTERNAL, "a second message; the method takes one")
                return
            wanted: i64 = (PREFIX_BYTES if stream.length < 0 else stream.length) - stream.size
            part = data[at : min(end, at + wanted)]
            at += len(part)
            parts = stream.parts
            if parts and len(part) < _SMALL_PART and len(parts[-1]) < _SMALL_PART:
                parts[-1] += part
            else:
                parts.append(part)
            stream.size += len(part)
            if stream.length < 0 and stream.size == PREFIX_BYTES:
                self._take_prefix(stream)
            if stream.size == stream.length and not stream.is_closed:
                self._complete(stream)

    def _take_prefix(self, stream: Stream) -> None:
        prefix = b"".join(stream.parts)
        stream.parts = []
        length: i64 = h2.NUMBER.unpack_from(prefix, 1)[0]
        stream.length = length + PREFIX_BYTES
        stream.is_compressed = prefix[0] == 1
        if prefix[0] > 1 or (stream.is_compressed and stream.head.encoding in ("", "identity")):
            self._refuse(stream, grpc.StatusCode.INTERNAL, "a message is compressed, and no encoding is given")
        elif length > self._server.max_message_bytes:
            self._refuse_size(stream, length)
        elif stream.length - stream.size > stream.room:
            self.grant(stream)

    def _refuse(self, stream: Stream, code: grpc.StatusCode, message: str) -> None:
        """Ends a call because of what the client sends; it is cancelled if it has begun."""
        cancel, stream.cancel = stream.cancel, None
        self.fail(stream, code, message)
        if cancel is not None:
            cancel()

    def _refuse_size(self, stream: Stream, length: i64) -> None:
        most = self._server.max_message_bytes
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        self._refuse(stream, code, f"Received message larger than max ({length} vs. {most})")

    def _complete(self, stream: Stream) -> None:
        stream.has_message = True
        if stream.messages is None:
            return  # until the client has sent all
        stream.messages.add(b"".join(stream.parts), is_compressed=stream.is_compressed)
        stream.parts = []
        stream.size = 0
        stream.length = -1

    def _end_request(self, stream: Stream) -> None:
        stream.is_received = True
        if stream.trailers is not None:
            return
        if stream.messages is not None:
            if stream.size:
                self._refuse(stream, grpc.StatusCode.INTERNAL, "the stream ends within a message")
            else:
                stream.messages.end()
        elif stream.size != stream.length:
            self.fail(stream, grpc.StatusCode.INTERNAL, "the request ends before its message is complete")
        elif stream.is_compressed or stream.size > LARGE_BYTES:
            joining = asyncio.get_running_loop().run_in_executor(None, self._message, stream)
            joining.add_done_callback(partial(self._begin_late, stream))
        else:
            message = b"".join(stream.parts)
            stream.parts = []
            self._server.begin(stream, message)

    def _begin_late(self, stream: Stream, joining: asyncio.Future[bytes]) -> None:
        stream.parts = []
        try:
            message = joining.result()
        except Exception as error:
            refused = faults.reported(log, "a message could not be read", error)
            self.fail(stream, refused.code, refused.message)
            return
        if stream.is_closed or not self._hold(stream, len(message) - stream.size):
            return
        self._server.begin(stream, message)
        self._server.turn_over()

    def _message(self, stream: Stream) -> bytes:
        """Returns a message that is complete. Raises RingmeshError."""
        data = b"".join(stream.parts)
        return inflated(data, self._server.max_message_bytes) if stream.is_compressed else data

    def grant(self, stream: Stream) -> None:
        """Gives the client room for what the reader of a stream has taken, and for the message that it has begun."""
        if stream.is_closed or stream.is_received or stream.trailers is not None:
            return
        held: i64 = 0 if stream.messages is None else stream.messages.bytes
        left: i64 = stream.length - stream.size if stream.length >= 0 else 0
        more: i64 = min(max(_STREAM_WINDOW - held, left), h2.MAX) - stream.room
        if more >= _STREAM_WINDOW // 2 or (more > 0 and stream.room < left):
            stream.room += more
            self._write(h2.window_update(stream.number, more))

    # Answers.

    def respond(self, stream: Stream, body: Sequence[bytes], headers: bytes, trailers: bytes) -> None:
        """Answers a call with one message, in pieces; `headers` and `trailers` are encoded."""
        if stream.is_closed:
            return
        number = stream.number
        size: i64 = 0
        for piece in body:
            size += len(piece)
        framed: i64 = size + PREFIX_BYTES
        if (
            framed <= self._frame_size
            and framed <= self._window
            and framed <= stream.window
            and len(trailers) <= self._frame_size
            and self._pending + framed <= _WRITE_BYTES
            and headers is ANSWER
            and not (stream.is_open or self._is_paused or self._blocked)
        ):
            self._window -= framed
            first = _FIRST.pack(
                0, len(ANSWER), h2.HEADERS, h2.END_HEADERS, number, ANSWER,
                framed >> 16, framed & 0xFFFF, h2.DATA, 0, number, 0, size,
            )  # fmt: skip
            last = h2.HEAD.pack(0, len(trailers), h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, number)
            if self._is_reading:
                self._out.append(first)
                self._out.extend(body)
                self._out.append(last)
                self._out.append(trailers)
                self._pending += framed
            else:
                self._write(b"".join((first, *body, last, trailers)))
            self._finish(stream)
            return
        self.open(stream, headers)
        self._queue(stream, body, size)
        stream.trailers = trailers
        self._send(stream)

    def fail(self, stream: Stream, code: grpc.StatusCode, message: str, trailing: Metadata = ()) -> None:
        """Ends a call with a status, after what was sent of its answer. Raises ValueError: see `failed`."""
        if stream.is_closed:
            return
        trailers = failed(code, message, trailing)
        if stream.is_open:
            self.end(stream, trailers)
        else:
            self._write(self._head_frames(h2.END_STREAM, stream.number, HEADERS + trailers))
            self._finish(stream)

    def open(self, stream: Stream, headers: bytes) -> None:
        """Sends the headers of an answer, unless they were sent."""
        if not (stream.is_open or stream.is_closed):
            stream.is_open = True
            self._write(self._head_frames(0, stream.number, headers))

    def send(self, stream: Stream, message: bytes) -> None:
        """Sends a message of a streamed answer; `stream.unsent_bytes` says how much still waits."""
        if not stream.is_closed:
            self.open(stream, ANSWER)
            self._queue(stream, (message,), len(message))
            self._send(stream)

    def end(self, stream: Stream, trailers: bytes) -> None:
        """Ends a streamed answer."""
        if stream.is_closed:
            return
        self.open(stream, ANSWER)
        stream.trailers = trailers
        self._send(stream)

    def reset(self, stream: Stream, code: int, *, is_cancelled: bool = False) -> None:
        """Ends a call without a status, in the middle of its answer or because its client broke the protocol."""
        if not stream.is_closed:
            self._write(h2.reset(stream.number, code))
            self._close(stream, is_cancelled=is_cancelled)

    def _queue(self, stream: Stream, body: Sequence[bytes], size: i64) -> None:
        stream.unsent.append(_PREFIX.pack(0, size))
        stream.unsent.extend([piece for piece in body if piece])
        stream.unsent_bytes += size + PREFIX_BYTES
        self._unsent += size + PREFIX_BYTES
        self._blocked[stream.number] = stream

    def _send(self, stream: Stream) -> None:
        """Sends what the windows and the socket's queue allow."""
        transport = self._transport
        if transport is None or stream.is_closed:
            return
        if self._is_reading or self._is_paused:
            self._blocked[stream.number] = stream
            self._send_soon()
            return
        out: list[bytes | memoryview] = []
        # A byte more than the socket's queue takes, so that it says when there is room again.
        room: i64 = min(_TURN_BYTES, _WRITE_BYTES + 1 - transport.get_write_buffer_size())
        sent: i64 = 0
        while stream.unsent:
            piece = stream.unsent[0]
            size: i64 = min(len(piece), self._window, stream.window, self._frame_size)
            if size <= 0:
                break
            if sent >= room:
                self._send_soon()
                break
            if size == len(piece):
                stream.unsent.popleft()
                part: bytes | memoryview = piece
            else:
                view = memoryview(piece)
                part = view[:size]
                stream.unsent[0] = view[size:]
            self._window -= size
            stream.window -= size
            sent += size
            out.append(h2.HEAD.pack(size >> 16, size & 0xFFFF, h2.DATA, 0, stream.number))
            out.append(part)
        stream.unsent_bytes -= sent
        self._unsent -= sent
        is_done = not stream.unsent and stream.trailers is not None
        if is_done and stream.trailers is not None:
            out.append(self._head_frames(h2.END_STREAM, stream.number, stream.trailers))
        if out:
            self._out.extend(out)
            self._flush()
        self._blocked.pop(stream.number, None)
        if is_done:
            self._finish(stream)
        elif stream.unsent:
            # Behind the others.
            self._blocked[stream.number] = stream
        if stream.unsent_bytes <= UNSENT_BYTES:
            _wake(stream)

    def _send_soon(self) -> None:
        if not (self._is_sending_soon or self._is_paused):
            self._is_sending_soon = True
            asyncio.get_running_loop().call_soon(self._send_blocked)

    def _send_blocked(self) -> None:
        self._is_sending_soon = False
        for stream in list(self._blocked.values()):
            if self._is_paused:
                return
            # The end of an answer needs no window.
            if not stream.unsent or (self._window > 0 and stream.window > 0):
                self._send(stream)

    def _head_frames(self, flags: int, number: i64, block: bytes) -> bytes:
        """A header block in frames that the client takes."""
        most: i64 = self._frame_size
        size: i64 = len(block)
        if size <= most:
            return h2.frame(h2.HEADERS, flags | h2.END_HEADERS, number, block)
        frames = [h2.frame(h2.HEADERS, flags, number, block[:most])]
        at: i64 = most
        while at < size:
            end: i64 = min(at + most, size)
            frames.append(h2.frame(h2.CONTINUATION, h2.END_HEADERS if end == size else 0, number, block[at:end]))
            at = end
        return b"".join(frames)

    def _finish(self, stream: Stream) -> None:
        """The answer is written. A client that has not sent all of its request may stop."""
        if not stream.is_received:
            self._write(h2.reset(stream.number, h2.NO_ERROR))
        self._close(stream, is_cancelled=False)

    def _close(self, stream: Stream, *, is_cancelled: bool) -> None:
        if stream.is_closed:
            return
        stream.is_closed = True
        self._streams.pop(stream.number, None)
        self._blocked.pop(stream.number, None)
        self._unsent -= stream.unsent_bytes
        stream.unsent_bytes = 0
        stream.unsent.clear()
        stream.parts = []
        self._server.request_bytes -= stream.held
        stream.held = 0
        _wake(stream)
        cancel, stream.cancel = stream.cancel, None
        if is_cancelled:
            if cancel is not None:
                cancel()
        elif stream.messages is not None:
            stream.messages.end()


def _wake(stream: Stream) -> None:
    if stream.drained is not None and not stream.drained.done():
        stream.drained.set_result(None)


def _peer(address: Any) -> str:
    """The client as gRPC names it."""
    if not isinstance(address, tuple):
        return "unix:"
    host, port = address[:2]
    return f"ipv6:%5B{quote(host, safe=':')}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"
