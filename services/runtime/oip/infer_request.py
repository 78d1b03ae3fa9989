"""Splits a serialized ModelInferRequest without a parser, because callers repeat a request with different data."""

from __future__ import annotations  # compiled by mypyc

from google.protobuf.message import DecodeError
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.request_limits import check_request
from services.runtime.rpc.rpc import parse

# Longer heads are not cached: they hold typed contents.
MAX_HEAD = 4096
# Tags of length-delimited fields; all fields of the message have this wire type.
_ID = 0x1A
_RAW_INPUT = 0x3A
_LENGTH_DELIMITED = 2
_MAX_HEADS = 4096
# With more fields, a parser is faster.
_MAX_FIELDS = 256


class SplitRequest:
    """A split request: `raws` are the raw_input_contents, `request_id` the id, and `head` all other bytes as sent.

    Requests with the same head differ only in raws and id. The head is not validated here: it is parsed once, and the
    result holds for all requests with that head.
    """

    def __init__(self, head: bytes, raws: list[bytes], request_id: str) -> None:
        self.head = head
        self.raws = raws
        self.request_id = request_id


def take_apart(data: bytes) -> SplitRequest | None:
    """Splits a request.

    Returns None if a parser should read it: malformed, without raw contents, with two ids, or with a large head or many
    fields.
    """
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
        return SplitRequest(head, raws, request_id.decode())
    except UnicodeDecodeError:
        return None


def request_id(data: bytes) -> str:
    """Returns the id of a request that was parsed successfully before."""
    parts = take_apart(data)
    return v2.ModelInferRequest.FromString(data).id if parts is None else parts.request_id


def model_name(data: bytes) -> str:
    """Returns the model name of a request that was answered; "" if it is malformed."""
    parts = take_apart(data)
    try:
        return v2.ModelInferRequest.FromString(data if parts is None else parts.head).model_name
    except DecodeError:
        return ""


def parse_request(data: bytes) -> v2.ModelInferRequest:
    """Parses a request. Raises InvalidArgumentError if it is malformed or exceeds the limits of request_limits.py."""
    check_request(data)
    return parse(v2.ModelInferRequest, data)


class Head:
    """The parsed head of a request. `checked` is the model that it was last validated against."""

    def __init__(self, message: v2.ModelInferRequest) -> None:
        self.checked: object = None
        self.message = message
        self.name = message.model_name
        self.version = message.model_version


class Read:
    """A parsed request.

    If it was split into `parts`, its head is shared with other requests, and the head's message lacks id and data.
    Otherwise the head's message is its own and complete.
    """

    def __init__(self, data: bytes, head: Head, parts: SplitRequest | None) -> None:
        self.data = data
        self.head = head
        self.parts = parts

    @property
    def request_id(self) -> str:
        return self.head.message.id if self.parts is None else self.parts.request_id

    @property
    def content(self) -> SplitRequest | bytes:
        """The content that `is_equal` compares; holding it does not keep the rest of the request in memory."""
        return self.data if self.parts is None else self.parts

    def is_equal(self, other: SplitRequest | bytes | None) -> bool:
        """Whether the `content` of another request has the same bytes; ids are ignored if both were split."""
        if self.parts is None:
            return other == self.data
        return isinstance(other, SplitRequest) and other.head == self.parts.head and other.raws == self.parts.raws


class RequestReader:
    """Reads requests, and parses each head once."""

    def __init__(self) -> None:
        self._heads: dict[bytes, Head] = {}

    def read(self, data: bytes) -> Read:
        """Reads a request. Raises InvalidArgumentError if `data` is malformed or exceeds the limits."""
        parts = take_apart(data)
        if parts is None:
            return Read(data, Head(parse_request(data)), None)
        head = self._heads.get(parts.head)
        if head is None:
            try:
                # Parse the head only: a message keeps all bytes that it was parsed from in memory.
                head = Head(v2.ModelInferRequest.FromString(parts.head))
            except DecodeError:
                parse(v2.ModelInferRequest, data)
                raise
            if len(self._heads) >= _MAX_HEADS:
                self._heads.clear()
            self._heads[parts.head] = head
        return Read(data, head, parts)
