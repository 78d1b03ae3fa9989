"""The client side of one HTTP/2 connection: the part of RFC 9113 that unary gRPC calls need.

A call in grpc.aio costs about 200 us of CPU regardless of its size, and with few callers few requests share a call.
Here a request is written in one piece, its header block is the same bytes each time, and no thread is between the
socket and the event loop. docs/decisions/0018 has the measurement.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Mapping
from typing import cast

from services.runtime.rpc import http2_frames as h2
from services.runtime.rpc.header_blocks import HeaderDecoder

# Bytes received on the connection before a WINDOW_UPDATE is sent.
_OUR_WINDOW = 1 << 30
_LARGEST_FRAME_TAKEN = 1 << 20
_MAX_HEADER_BYTES = 1 << 16
# Maximum number of decoded header blocks kept. A server has few, unless its metadata differs each time.
_MAX_BLOCKS = 256


class RequestError(Exception):
    """A request got no response; the message gives the reason."""


class ConnectionLostError(RequestError):
    """The connection ended, or the server violated the protocol, while the request was under way."""


class Stream:
    """One request and its response: `headers` of the response, trailers included, and `pieces` of the body.

    `on_end` is called with the stream when it has ended. `error` says why there is no response; it is None if there is
    one. Errors of the server itself are in `headers`.
    """

    def __init__(self, window: int, on_end: Callable[[Stream], None]) -> None:
        self.window = window
        self.on_end = on_end
        # Whether the request's headers were sent.
        self.is_open = False
        self.error: RequestError | None = None
        self.headers: dict[str, str] = {}
        # The body, `size` bytes in total. A large body is not joined here.
        self.pieces: list[bytes] = []
        self.size = 0
        # The part of the request's body that flow control does not allow to be sent yet.
        self.unsent = memoryview(b"")


class Connection(asyncio.Protocol):
    """A connection for many concurrent requests. `on_lost` is called when it has ended."""

    def __init__(self, on_lost: Callable[[Connection], None]) -> None:
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._streams: dict[int, Stream] = {}
        # Concurrent streams that the server allows, open streams, and requests that wait for a stream.
        self._max_streams = h2.MAX
        self._open_streams = 0
        self._queued: deque[tuple[int, bytes, bytes]] = deque()
        self._next_id = 1
        self._window = h2.DEFAULT_WINDOW
        self._stream_window = h2.DEFAULT_WINDOW
        self._frame_size = h2.DEFAULT_FRAME
        self._unacknowledged = 0
        self._decoder = HeaderDecoder(_MAX_HEADER_BYTES)
        # Decoded header blocks, for the current table of the decoder.
        self._blocks: dict[bytes, Mapping[str, str]] = {}
        self._block = bytearray()
        self._block_flags = 0
        self._leaving = False
        # Callbacks for the acknowledgement of pings, by number.
        self._pings: dict[int, Callable[[], None]] = {}
        self._next_ping = 0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._leaving and self._next_id < h2.MAX

    def is_local(self, port: int) -> bool:
        """Whether the peer is `port` on this host, not a proxy: both ends of the connection have the same address."""
        if self._transport is None:
            return False
        ours, theirs = (self._transport.get_extra_info(name) for name in ("sockname", "peername"))
        return isinstance(ours, tuple) and isinstance(theirs, tuple) and theirs[:2] == (ours[0], port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Sends preface and settings: no header table, so that each block is self-contained; no push; full windows."""
        self._transport = made = cast("asyncio.Transport", transport)
        settings = (
            (h2.HEADER_TABLE_SIZE, 0),
            (h2.ENABLE_PUSH, 0),
            (h2.INITIAL_WINDOW_SIZE, h2.MAX),
            (h2.MAX_FRAME_SIZE, _LARGEST_FRAME_TAKEN),
        )
        made.write(h2.PREFACE + h2.opening(settings))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._fail_all(f"the connection ended: {error}" if error else "the connection ended")
        self._on_lost(self)

    def request(self, headers: bytes, body: bytes, on_end: Callable[[Stream], None]) -> int:
        """Starts a request with an encoded header block. Returns its number, for `cancel`; `on_end` gets the stream."""
        assert self._transport is not None
        number = self._next_id
        self._next_id += 2
        self._streams[number] = Stream(self._stream_window, on_end)
        if self._open_streams < self._max_streams and not self._queued:
            self._open(number, headers, body)
        else:
            self._queued.append((number, headers, body))
        return number

    def _open(self, number: int, headers: bytes, body: bytes) -> None:
        assert self._transport is not None
        self._open_streams += 1
        stream = self._streams[number]
        stream.is_open = True
        head = h2.frame(h2.HEADERS, h2.END_HEADERS, number, headers)
        if len(body) <= min(self._window, stream.window, self._frame_size):
            self._window -= len(body)
            self._transport.write(b"".join((head, h2.head(len(body), h2.DATA, h2.END_STREAM, number), body)))
        else:
            self._transport.write(head)
            stream.unsent = memoryview(body)
            self._send(number, stream)

    def _open_queued(self) -> None:
        while self._queued and self._open_streams < self._max_streams and self._transport is not None:
            number, headers, body = self._queued.popleft()
            if number in self._streams:  # else it was cancelled
                self._open(number, headers, body)

    def cancel(self, number: int) -> None:
        """Cancels a request: resets its stream at the server. `on_end` is not called."""
        stream = self._remove(number)
        if stream is not None and stream.is_open:
            self._write(h2.reset(number, h2.CANCEL))

    def ping(self, acknowledged: Callable[[], None]) -> Callable[[], object]:
        """Sends a PING and calls `acknowledged` on its acknowledgement. Returns a function that stops the wait."""
        number = self._next_ping
        self._next_ping += 1
        self._pings[number] = acknowledged
        self._write(h2.frame(h2.PING, 0, 0, struct.pack(">Q", number)))
        return lambda: self._pings.pop(number, None)

    def close(self) -> None:
        """Aborts the connection and all requests under way, even if the peer no longer reads."""
        self._leaving = True
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        position = 0
        try:
            while len(received) - position >= 9:
                length = int.from_bytes(received[position : position + 3], "big")
                if length > _LARGEST_FRAME_TAKEN:
                    raise h2.ProtocolError(h2.FRAME_SIZE_ERROR, f"the server sent a frame of {length} bytes")
                end = position + 9 + length
                if len(received) < end:
                    break
                kind, flags = received[position + 3], received[position + 4]
                number = int.from_bytes(received[position + 5 : position + 9], "big") & h2.MAX
                self._take(kind, flags, number, bytes(received[position + 9 : end]))
                position = end
        except (h2.ProtocolError, struct.error) as error:
            self._leaving = True
            self._fail_all(f"the server broke the protocol: {error}")
            if self._transport is not None:
                self._transport.abort()
        del received[:position]

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._block_flags and kind != h2.CONTINUATION:
            raise h2.ProtocolError(h2.PROTOCOL_ERROR, "another frame between those of a header block")
        if kind == h2.DATA:
            self._take_data(flags, number, payload)
        elif kind == h2.HEADERS:
            self._take_block(flags, number, h2.fragment(payload, flags))
        elif kind == h2.CONTINUATION:
            self._take_block(flags | self._block_flags & h2.END_STREAM, number, payload)
        elif kind == h2.SETTINGS and not flags & h2.ACK:
            self._take_settings(payload)
        elif kind == h2.WINDOW_UPDATE:
            self._take_room(number, h2.NUMBER.unpack(payload)[0] & h2.MAX)
        elif kind == h2.PING and not flags & h2.ACK:
            self._write(h2.frame(h2.PING, h2.ACK, 0, payload))
        elif kind == h2.PING:
            acknowledged = self._pings.pop(struct.unpack(">Q", payload)[0], None)
            if acknowledged is not None:
                acknowledged()
        elif kind == h2.RST_STREAM:
            error = h2.NUMBER.unpack(payload)[0]
            self._fail(number, RequestError(f"the server gave up the request (HTTP/2 error {error})"))
        elif kind == h2.GOAWAY:
            self._take_goaway(payload)

    def _take_data(self, flags: int, number: int, payload: bytes) -> None:
        self._unacknowledged += len(payload)
        if self._unacknowledged > _OUR_WINDOW:
            self._write(h2.window_update(0, self._unacknowledged))
            self._unacknowledged = 0
        stream = self._streams.get(number)
        if stream is None:  # it was cancelled
            return
        if flags & h2.PADDED:
            payload = h2.unpadded(payload)
        stream.pieces.append(payload)
        stream.size += len(payload)
        if stream.size > h2.MAX:
            raise h2.ProtocolError(h2.PROTOCOL_ERROR, "a response of more than 2 GiB")
        if flags & h2.END_STREAM:
            self._end(number)

    def _take_block(self, flags: int, number: int, part: bytes) -> None:
        self._block += part
        if not flags & h2.END_HEADERS:
            self._block_flags = flags | h2.END_HEADERS
            return
        block, self._block_flags = bytes(self._block), 0
        self._block.clear()
        headers = self._decode(block)
        stream = self._streams.get(number)
        if stream is not None:
            stream.headers.update(headers)
            if flags & h2.END_STREAM:
                self._end(number)

    def _decode(self, block: bytes) -> Mapping[str, str]:
        headers = self._blocks.get(block)
        if headers is None:
            decoder = self._decoder
            before = decoder.changes
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in decoder.decode(block)}
            if decoder.size > _MAX_HEADER_BYTES:
                raise h2.ProtocolError(h2.ENHANCE_YOUR_CALM, f"the server sent {decoder.size} bytes of headers")
            if decoder.changes != before or len(self._blocks) >= _MAX_BLOCKS:
                self._blocks.clear()
            if decoder.changes == before:
                self._blocks[block] = headers
        return headers

    def _take_settings(self, payload: bytes) -> None:
        for identifier, value in struct.iter_unpack(">HI", payload):
            if identifier == h2.INITIAL_WINDOW_SIZE:
                more, self._stream_window = value - self._stream_window, value
                for stream in self._streams.values():
                    stream.window += more
            elif identifier == h2.MAX_FRAME_SIZE:
                self._frame_size = value
            elif identifier == h2.MAX_CONCURRENT_STREAMS:
                self._max_streams = value
        self._write(h2.frame(h2.SETTINGS, h2.ACK, 0, b""))
        self._send_all()
        self._open_queued()

    def _take_room(self, number: int, size: int) -> None:
        if number == 0:
            self._window += size
            self._send_all()
        elif (stream := self._streams.get(number)) is not None:
            stream.window += size
            self._send(number, stream)

    def _take_goaway(self, payload: bytes) -> None:
        """Fails the requests that the server has not seen, so they may be sent elsewhere. It finishes the others."""
        self._leaving = True
        last = h2.NUMBER.unpack_from(payload)[0] & h2.MAX
        for number in [number for number in self._streams if number > last]:
            self._fail(number, RequestError("the server is leaving"))
        self._close_if_done()

    def _send_all(self) -> None:
        for number, stream in list(self._streams.items()):
            self._send(number, stream)

    def _send(self, number: int, stream: Stream) -> None:
        while stream.unsent:
            size = min(self._window, stream.window, self._frame_size, len(stream.unsent))
            if size <= 0:
                return
            part, stream.unsent = stream.unsent[:size], stream.unsent[size:]
            self._window -= size
            stream.window -= size
            self._write(h2.head(size, h2.DATA, 0 if stream.unsent else h2.END_STREAM, number) + part)

    def _end(self, number: int) -> None:
        stream = self._remove(number)
        assert stream is not None
        if stream.unsent:  # the server has answered without reading the whole body
            self._write(h2.reset(number, h2.CANCEL))
        stream.on_end(stream)
        self._close_if_done()

    def _fail(self, number: int, error: RequestError) -> None:
        stream = self._remove(number)
        if stream is not None:
            stream.error = error
            stream.on_end(stream)
        self._close_if_done()

    def _remove(self, number: int) -> Stream | None:
        """Removes a stream; a waiting request may then start."""
        stream = self._streams.pop(number, None)
        if stream is not None and stream.is_open:
            self._open_streams -= 1
            if self._queued:
                asyncio.get_running_loop().call_soon(self._open_queued)
        return stream

    def _fail_all(self, why: str) -> None:
        for number in list(self._streams):
            self._fail(number, ConnectionLostError(why))

    def _close_if_done(self) -> None:
        if self._leaving and not self._streams and self._transport is not None:
            self._transport.close()

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)
