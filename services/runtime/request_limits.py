"""Limits for a serialized ModelInferRequest, checked on its bytes before a parser builds objects.

A parser needs 15 to 25 ns for each element, whatever its size, and reading the resulting objects takes up to ten times
as long, all under the GIL. So elements are counted here; the limits keep the GIL held for less than 50 ms a request
(see docs/models.md). Data in raw_input_contents is bounded only by the message size.
"""

from __future__ import annotations  # compiled by mypyc

import numpy as np

from services.runtime.errors import InvalidArgumentError, ResourceExhaustedError

# Limit for inputs, outputs, parameters and raw contents of a request together, and for the fields of its inputs. In
# requests of other methods, limit for the items of a list.
MAX_FIELDS = 16_384
# A request without the data of its inputs: names, shapes, parameters.
MAX_HEAD_BYTES = 256 << 10
# Limit for strings in a request, which are the elements of BYTES.
MAX_STRINGS = 131_072
# Integers and booleans in typed contents, which are decoded one by one.
MAX_INTEGERS = 1 << 19
# Bytes of typed contents in a request; they are copied four times.
MAX_TYPED_BYTES = 16 << 20
# Size of a request of another method that carries no tensor data.
MAX_PLAIN_BYTES = 2 << 20

_LENGTH_DELIMITED = 2
# Tags of fields of the request, of its inputs, and of their contents.
_INPUT = 0x2A
_RAW_INPUT = 0x3A
_CONTENTS = 0x2A
_INTEGERS = frozenset({0x0A, 0x12, 0x1A, 0x22, 0x2A})
_LONGEST_VARINT = 10


class _MalformedError(Exception):
    pass


def check_request(data: bytes) -> None:
    """Raises InvalidArgumentError if `data` is not a serialized message, or holds more than the limits allow."""
    try:
        _check_request(data)
    except _MalformedError:
        raise InvalidArgumentError(
            f"the {len(data)} bytes received are not a serialized inference.ModelInferRequest"
        ) from None


def check_embedded(data: bytes, tag: int) -> None:
    """Like `check_request`, for a message that holds one request in the field with this `tag`."""
    position = fields = 0
    is_there = False
    try:
        while position < len(data):
            fields += 1
            if fields > MAX_FIELDS:
                raise _too_many_fields()
            found, start = _varint(data, position, len(data))
            position = _skip(data, start, len(data), found & 7)
            if found == tag:
                if is_there:  # a parser would merge them
                    raise InvalidArgumentError("the request is given twice")
                is_there = True
                length, _ = _varint(data, start, len(data))
                check_request(data[position - length : position])
    except _MalformedError:
        raise InvalidArgumentError(f"the {len(data)} bytes received are not a serialized message") from None


def check_list(data: bytes) -> None:
    """Raises InvalidArgumentError if a serialized message of any kind has more than MAX_FIELDS fields.

    Malformed messages are left to the parser.
    """
    position = fields = 0
    try:
        while position < len(data):
            fields += 1
            if fields > MAX_FIELDS:
                raise InvalidArgumentError(f"the request lists more than {MAX_FIELDS} items; at most that many")
            tag, position = _varint(data, position, len(data))
            position = _skip(data, position, len(data), tag & 7)
    except _MalformedError:
        return


def check_size(data: bytes) -> None:
    if len(data) > MAX_PLAIN_BYTES:
        raise ResourceExhaustedError(
            f"the request has {len(data)} bytes; one of this method has at most {MAX_PLAIN_BYTES}", kind="too_large"
        )


def _check_request(data: bytes) -> None:
    size = len(data)
    position = fields = head = 0
    inputs: list[int] = []
    while position < size:
        fields += 1
        if fields > MAX_FIELDS:
            raise _too_many_fields()
        tag, start = _varint(data, position, size)
        end = _skip(data, start, size, tag & 7)
        if tag != _RAW_INPUT:
            head += end - position
            if tag == _INPUT:
                inputs.append(start)
        position = end
    if head > MAX_HEAD_BYTES:
        head -= _contents_bytes(data, inputs)
    if head > MAX_HEAD_BYTES:
        raise InvalidArgumentError(
            f"names, shapes and parameters of the request take {head} bytes; at most {MAX_HEAD_BYTES}"
        )


def _contents_bytes(data: bytes, inputs: list[int]) -> int:
    """Returns the bytes of typed contents in the inputs at the positions `inputs`.

    Raises InvalidArgumentError if the contents exceed a limit.
    """
    size = len(data)
    fields = strings = integers = contents = 0
    for position in inputs:
        length, position = _varint(data, position, size)
        end = position + length
        while position < end:
            fields += 1
            if fields > MAX_FIELDS:
                raise _too_many_fields()
            tag, start = _varint(data, position, end)
            position = _skip(data, start, end, tag & 7)
            if tag != _CONTENTS:
                continue
            contents += position - start
            if contents > MAX_TYPED_BYTES:
                raise _too_much_typed(f"take more than {MAX_TYPED_BYTES} bytes")
            _, element = _varint(data, start, position)
            while element < position:
                strings += 1
                if strings > MAX_STRINGS:
                    raise InvalidArgumentError(
                        f"typed contents hold more than {MAX_STRINGS} strings, which is the most for a request",
                        field="inputs",
                    )
                tag, start = _varint(data, element, position)
                element = _skip(data, start, position, tag & 7)
                if tag in _INTEGERS:
                    integers += _count_integers(data, start, element)
                    if integers > MAX_INTEGERS:
                        raise _too_much_typed(f"hold more than {MAX_INTEGERS} integers")
    return contents


def _count_integers(data: bytes, start: int, end: int) -> int:
    """Counts the integers of the packed field whose length is at `start`: each ends with a byte below 128."""
    length, start = _varint(data, start, end)
    if length > MAX_INTEGERS * _LONGEST_VARINT:
        return length
    return int(np.count_nonzero(np.frombuffer(data, np.uint8, length, start) < 0x80))


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """Returns the number at `position`, and the position after it."""
    number = shift = 0
    while position < end and shift < 7 * _LONGEST_VARINT:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
    raise _MalformedError


def _skip(data: bytes, position: int, end: int, kind: int) -> int:
    """Returns the end of the value of wire type `kind` at `position`. Groups count as malformed: no message has any."""
    if kind == _LENGTH_DELIMITED:
        length, position = _varint(data, position, end)
        position += length
    elif kind == 0:
        _, position = _varint(data, position, end)
    elif kind == 1:
        position += 8
    elif kind == 5:
        position += 4
    else:
        raise _MalformedError
    if position > end:
        raise _MalformedError
    return position


def _too_many_fields() -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the request has more than {MAX_FIELDS} inputs, outputs, parameters and raw_input_contents, which is the most "
        "for a request"
    )


def _too_much_typed(much: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"typed contents {much}, which is the most for a request; raw_input_contents has no such limit", field="inputs"
    )
