"""What the headers of a gRPC call say, and the headers and trailers of its answer (PROTOCOL-HTTP2.md of gRPC)."""

from __future__ import annotations  # compiled by mypyc

import re
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Sequence
from typing import Final, Generic, TypeVar
from urllib.parse import quote

import grpc

from services.runtime.rpc.header_blocks import Field, encode_field, encode_name, encode_value
from services.runtime.rpc.rpc import Metadata

Method = TypeVar("Method")

_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_MAX_DIGITS: Final = 8
# Headers of the connection, which HTTP/2 does not have (RFC 9113 8.2.2).
_FORBIDDEN: Final = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))
_NAME: Final = re.compile(r"[0-9a-z_.-]+")
_NAME_RECEIVED: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE_REFUSED: Final = re.compile(rb"[\0\r\n]")
_CONTENT: Final = b"application/grpc"
# Visible ASCII but %, which is the escape itself.
_UNQUOTED: Final = "".join(chr(code) for code in range(0x20, 0x7F) if code != ord("%"))
HEADERS: Final = encode_field(b":status", b"200") + encode_field(b"content-type", _CONTENT)
_ACCEPTED: Final = encode_field(b"grpc-accept-encoding", b"identity,gzip")
ANSWER: Final = HEADERS + _ACCEPTED
NOT_GRPC: Final = encode_field(b":status", b"415")
_OK: Final = encode_field(b"grpc-status", b"0")
# Encoded entries of metadata: most are sent again, such as the name of a worker.
_ENTRIES: Final[dict[tuple[str, str | bytes], bytes]] = {}
_MOST_ENTRIES: Final = 1000
# Trace ids and the like are not sent again.
_ID_LENGTH: Final = 32
_NAMES: Final[dict[str, bytes]] = {}


class RequestHead(Generic[Method]):
    """The headers of a call. `method` is what the server has at the path; None: nothing.

    `timeout` is in seconds; None: none. `is_malformed`: HTTP/2 does not allow such a request. `is_grpc`: its content
    type is gRPC's. `code` and `message` are the status that the call ends with at once, unless `code` is OK. `size` is
    that of all fields, as HPACK counts them.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.method: Method | None = None
        self.path = ""
        self.metadata: tuple[tuple[str, str | bytes], ...] = ()
        self.timeout: float | None = None
        self.encoding = ""
        self.is_malformed = False
        self.is_grpc = False
        self.code = grpc.StatusCode.OK
        self.message = ""

    def refuse(self, code: grpc.StatusCode, message: str) -> None:
        """Sets the status; the first counts."""
        if self.code is grpc.StatusCode.OK:
            self.code, self.message = code, message


def read_head(fields: Sequence[Field], size: int) -> RequestHead[Method]:
    """Reads the headers of a request; `method` is left to the server."""
    head: RequestHead[Method] = RequestHead(size)
    metadata: list[tuple[str, str | bytes]] = []
    pseudo: dict[bytes, bytes] = {}
    has_others = False
    for name, value in fields:
        if name.startswith(b":"):
            if has_others or name in pseudo or name not in (b":method", b":scheme", b":path", b":authority"):
                head.is_malformed = True
            pseudo[name] = value
            continue
        has_others = True
        if name in _FORBIDDEN or _NAME_RECEIVED.fullmatch(name) is None or _VALUE_REFUSED.search(value) is not None:
            head.is_malformed = True
        elif name == b"te":
            head.is_malformed = head.is_malformed or value != b"trailers"
        elif name == b"content-type":
            head.is_grpc = value == _CONTENT or value.startswith((_CONTENT + b"+", _CONTENT + b";"))
        elif name == b"grpc-timeout":
            head.timeout = _seconds(value)
            if head.timeout is None:
                head.refuse(grpc.StatusCode.INTERNAL, f"grpc-timeout is {value!r}; it is up to 8 digits and a unit")
        elif name == b"grpc-encoding":
            head.encoding = value.decode("latin-1")
        elif not name.startswith(b"grpc-") or name.startswith((b"grpc-trace", b"grpc-tags")):
            _add(head, metadata, name.decode(), value)
    if not (pseudo.get(b":path") and b":scheme" in pseudo and b":method" in pseudo):
        head.is_malformed = True
    if pseudo.get(b":method") != b"POST":
        head.is_grpc = False
    if head.encoding not in ("", "identity", "gzip"):
        head.refuse(grpc.StatusCode.UNIMPLEMENTED, f"the encoding {head.encoding!r} is not supported; gzip is")
    head.path = pseudo.get(b":path", b"").decode("latin-1")
    head.metadata = tuple(metadata)
    return head


def _add(head: RequestHead[Method], metadata: list[tuple[str, str | bytes]], name: str, value: bytes) -> None:
    if not name.endswith("-bin"):
        metadata.append((name, value.decode("latin-1")))
        return
    for part in value.split(b","):
        try:
            metadata.append((name, b64decode(part.strip() + b"=" * (-len(part.strip()) % 4), validate=True)))
        except (Base64Error, ValueError):
            head.refuse(grpc.StatusCode.INTERNAL, f"the metadata {name} is not base64")


def _seconds(timeout: bytes) -> float | None:
    digits, unit = timeout[:-1].decode("latin-1"), timeout[-1:].decode("latin-1")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= _MAX_DIGITS and unit in _UNITS):
        return None
    return int(digits) * _UNITS[unit]


def headers(initial: Metadata) -> bytes:
    """The encoded headers of an answer, with its initial metadata. Raises ValueError: see `trailers`."""
    return ANSWER + _encoded(initial) if initial else ANSWER


def trailers(trailing: Metadata) -> bytes:
    """The encoded trailers of an answer that succeeds. Raises ValueError if gRPC does not allow this metadata."""
    return _OK + _encoded(trailing)


def failed(code: grpc.StatusCode, message: str, trailing: Metadata) -> bytes:
    """The encoded trailers of a failure. Raises ValueError: see `trailers`."""
    number: int = code.value[0]
    status = encode_field(b"grpc-status", b"%d" % number)
    text = encode_field(b"grpc-message", quote(message, safe=_UNQUOTED, errors="replace").encode()) if message else b""
    return b"".join((status, text, _encoded(trailing)))


def _encoded(metadata: Metadata) -> bytes:
    parts: list[bytes] = []
    for entry in metadata:
        encoded = _ENTRIES.get(entry)
        if encoded is None:
            encoded = _encode(entry[0], entry[1])
            if len(entry[1]) < _ID_LENGTH:
                if len(_ENTRIES) >= _MOST_ENTRIES:
                    _ENTRIES.clear()
                _ENTRIES[entry] = encoded
        parts.append(encoded)
    return b"".join(parts)


def _encode(name: str, value: str | bytes) -> bytes:
    encoded_name = _NAMES.get(name)
    if encoded_name is None:
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is no name of metadata")
        encoded_name = encode_name(name.encode())
        if len(_NAMES) >= _MOST_ENTRIES:
            _NAMES.clear()
        _NAMES[name] = encoded_name
    if name.endswith("-bin"):
        text = b64encode(value if isinstance(value, bytes) else value.encode()).rstrip(b"=")
    else:
        shown = value if isinstance(value, str) else value.decode("latin-1")
        if not (shown.isascii() and shown.isprintable()):
            raise ValueError(f"the value {value!r} of the metadata {name} is not visible ASCII")
        text = shown.encode()
    return encoded_name + encode_value(text)
