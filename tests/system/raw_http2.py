"""A client that speaks HTTP/2 frame by frame, for what no gRPC library would send."""

import socket
import struct
from typing import NamedTuple

import hpack

from services.runtime.rpc import http2_frames as h2

EMPTY = bytes(5)


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes
    headers: dict = {}  # noqa: RUF012 - of HEADERS


def frame(kind, flags, stream, payload=b""):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload


class RawClient:
    """One connection, by `tls`, an SSLContext, unless it is None; `settings` are pairs of RFC 9113 6.5.2. Reads wait up
    to `seconds`."""

    def __init__(self, port, settings=(), seconds=60, tls=None):
        self.socket = socket.create_connection(("127.0.0.1", port), seconds)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname="127.0.0.1")
        self._encoder, self._decoder = hpack.Encoder(), hpack.Decoder()
        self._received = b""
        payload = b"".join(struct.pack(">HI", *setting) for setting in settings)
        self.send(h2.PREFACE + frame(h2.SETTINGS, 0, 0, payload))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def headers(self, stream, headers, flags=h2.END_HEADERS):
        block = self._encoder.encode(headers)
        self.send(frame(h2.HEADERS, flags, stream, block))

    def call(self, stream, headers, body=EMPTY):
        block = self._encoder.encode(headers)
        self.send(frame(h2.HEADERS, h2.END_HEADERS, stream, block) + frame(h2.DATA, h2.END_STREAM, stream, body))

    def read(self):
        """The next frame. Raises EOFError where the server has closed, and TimeoutError."""
        head = self._take(9)
        kind, flags = head[3], head[4]
        stream = int.from_bytes(head[5:9], "big") & 0x7FFFFFFF
        payload = self._take(int.from_bytes(head[:3], "big"))
        headers = dict(self._decoder.decode(payload)) if kind == h2.HEADERS else {}
        return Frame(kind, flags, stream, payload, headers)

    def until(self, wanted):
        """The first frame that `wanted` is true for."""
        while not wanted(found := self.read()):
            pass
        return found

    def outcome(self, stream):
        """How a call ended: its grpc-status, HTTP status, "reset", "goaway" or "closed"."""
        try:
            last = self.until(
                lambda got: (
                    got.kind == h2.GOAWAY
                    or (got.stream == stream and (got.kind == h2.RST_STREAM or got.flags & h2.END_STREAM))
                )
            )
        except (EOFError, ConnectionError):
            return "closed"
        if last.kind in (h2.GOAWAY, h2.RST_STREAM):
            return "goaway" if last.kind == h2.GOAWAY else "reset"
        status = last.headers.get("grpc-status")
        return f"http {last.headers.get(':status')}" if status is None else int(status)

    def ping(self):
        """Sends one; the next frame that answers it, or says goodbye."""
        self.send(frame(h2.PING, 0, 0, b"ringmesh"))
        return self.until(lambda got: (got.kind == h2.PING and got.flags & h2.ACK) or got.kind == h2.GOAWAY)

    def _take(self, size):
        while len(self._received) < size:
            if not (data := self.socket.recv(1 << 16)):
                raise EOFError
            self._received += data
        taken, self._received = self._received[:size], self._received[size:]
        return taken
