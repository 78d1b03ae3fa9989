"""A serialized ModelInferRequest taken apart without a parser: callers send the same one again with other data."""

from __future__ import annotations  # compiled by mypyc

from google.protobuf.message import DecodeError
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.request_limits import check_request
from services.runtime.rpc.rpc import parse

# Longer heads are not worth remembering: typed contents stand in them.
MAX_HEAD = 4096
# Tags of length-delimited fields; all fields of the message are.
_ID = 0x1A
_RAW_INPUT = 0x3A
_LENGTH_DELIMITED = 2
_MAX_HEADS = 4096
# Of more, a parser is through sooner.
_MAX_FIELDS = 256


class Parts:
    """`raws` are the raw_input_contents, `request_id` the id, and `head` is all the rest, as it was sent.

    Two of the same head differ in nothing else. The head itself may be anything: who parses it once knows of all.
    """

    __slots__ = ("head", "raws", "request_id")

    def __init__(self, head: bytes, raws: list[bytes], request_id: str) -> None:
        self.head = head
        self.raws = raws
        self.request_id = request_id


def take_apart(data: bytes) -> Parts | None:
    """None where it is better parsed: not well-formed, without raw contents, or with much else or two ids."""
    size = len(data)
    raws: list[bytes] = []
    kept: list[bytes] = []
    request_id = b""
    kept_from = position = fields = 0
    while position < size:
        fields += 1
        if fields > _MAX_FIELDS:
            return None
        start = position
        tag = data[position]
        position += 1
        if tag & 7 != _LENGTH_DELIMITED or tag >= 0x80 or tag < 8:
            return None
        length = shift = 0
        while True:
            if position >= size or shift > 28:
                return None
            byte = data[position]
            position += 1
            length |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        position += length
        if position > size:
            return None
        if tag == _RAW_INPUT:
            raws.append(data[position - length : position])
        elif tag == _ID and not request_id:
            request_id = data[position - length : position]
        elif tag == _ID:
            return None
        else:
            continue
        if start > kept_from:
            kept.append(data[kept_from:start])
        kept_from = position
    if not raws:
        return None
    if kept_from < size:
        kept.append(data[kept_from:])
    head = kept[0] if len(kept) == 1 else b"".join(kept)
    if len(head) > MAX_HEAD:
        return None
    try:
        return Parts(head, raws, request_id.decode())
    except UnicodeDecodeError:
        return None


def request_id(data: bytes) -> str:
    """Of a request that was read before."""
    parts = take_apart(data)
    return v2.ModelInferRequest.FromString(data).id if parts is None else parts.request_id


def model_name(data: bytes) -> str:
    """Of a request that was answered; "" where it is no request."""
    parts = take_apart(data)
    try:
        return v2.ModelInferRequest.FromString(data if parts is None else parts.head).model_name
    except DecodeError:
        return ""


def parse_request(data: bytes) -> v2.ModelInferRequest:
    """Raises InvalidArgumentError if it is not one, or holds more than request_limits.py allows."""
    check_request(data)
    return parse(v2.ModelInferRequest, data)


class Head:
    """What the head of a request says. `checked` is the model that it was last found to fit."""

    __slots__ = ("checked", "message", "name", "version")

    def __init__(self, message: v2.ModelInferRequest) -> None:
        self.checked: object = None
        self.message = message
        self.name = message.model_name
        self.version = message.model_version


class Read:
    """A request that was read.

    Where it was taken apart into `parts`, others share its head, and the message there is without id and data; else the
    message is its own and whole.
    """

    __slots__ = ("data", "head", "parts")

    def __init__(self, data: bytes, head: Head, parts: Parts | None) -> None:
        self.data = data
        self.head = head
        self.parts = parts

    @property
    def request_id(self) -> str:
        """What the caller calls it."""
        return self.head.message.id if self.parts is None else self.parts.request_id

    @property
    def content(self) -> Parts | bytes:
        """What `is_equal` compares, without the rest of the memory."""
        return self.data if self.parts is None else self.parts

    def is_equal(self, other: Parts | bytes | None) -> bool:
        """Whether the `content` of another request has the same bytes; where both were taken apart, ids aside."""
        if self.parts is None:
            return other == self.data
        return isinstance(other, Parts) and other.head == self.parts.head and other.raws == self.parts.raws


class RequestReader:
    """Reads requests, and parses each head once."""

    def __init__(self) -> None:
        self._heads: dict[bytes, Head] = {}

    def read(self, data: bytes) -> Read:
        """Raises InvalidArgumentError where `data` is not a serialized ModelInferRequest, or holds too much."""
        parts = take_apart(data)
        if parts is None:
            return Read(data, Head(parse_request(data)), None)
        head = self._heads.get(parts.head)
        if head is None:
            try:
                # Not of the data: a message holds on to all it was parsed from.
                head = Head(v2.ModelInferRequest.FromString(parts.head))
            except DecodeError:
                parse(v2.ModelInferRequest, data)
                raise
            if len(self._heads) >= _MAX_HEADS:
                self._heads.clear()
            self._heads[parts.head] = head
        return Read(data, head, parts)
