"""HPACK (RFC 7541): decodes the header blocks of one connection, and encodes without a table.

The decoder of the library hpack takes 33 us for a block with a new traceparent. This one takes 9 to 12 us; it uses the
library's static table and Huffman code.
"""

from __future__ import annotations  # compiled by mypyc

from typing import Final, TypeAlias

from hpack.exceptions import HPACKError
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable
from mypy_extensions import i64  # compiled: no number has more than 36 bits

from services.runtime.rpc.http2_frames import COMPRESSION_ERROR, ProtocolError

Field: TypeAlias = "tuple[bytes, bytes]"
# Of the dynamic table, in bytes, which a client may use until it is told otherwise.
TABLE_BYTES: Final = 4096
# What a field counts beside its name and value.
_FIELD_BYTES: Final = 32
_STATIC: Final[list[Field]] = [(b"", b""), *HeaderTable.STATIC_TABLE]
_STATIC_COUNT: Final = len(_STATIC) - 1
_INDEXED: Final = 0x80
_LITERAL_INDEXED: Final = 0x40
_TABLE_SIZE: Final = 0x20
_HUFFMAN: Final = 0x80
_CONTINUES: Final = 0x80
# No number in a block needs more bits.
_MAX_SHIFT: Final = 28
# Decoded strings that are kept, and the longest.
_KEPT_STRINGS: Final = 256
_KEPT_BYTES: Final = 256
# Huffman's code has up to 30 bits for a byte.
_MOST_EXPANDED: Final = 4


class HeaderError(ProtocolError):
    """A block is not valid HPACK, after which no other block of the connection can be read."""

    def __init__(self, message: str) -> None:
        super().__init__(COMPRESSION_ERROR, message)


class HeaderDecoder:
    """Decodes blocks in the order of their arrival. Blocks with more than `limit` bytes of fields are read, but only
    their first fields are kept: see `size`."""

    def __init__(self, limit: int) -> None:
        self._limit: i64 = limit
        # A longer string has more bytes than the table even if it is compressed: its length is all that counts.
        self._longest: i64 = max(limit, _MOST_EXPANDED * TABLE_BYTES)
        # The oldest entry first.
        self._table: list[Field] = []
        self._table_bytes: i64 = 0
        self._table_limit: i64 = TABLE_BYTES
        # Grows with each change of the table: as long as it stays the same, equal blocks mean equal fields.
        self.changes = 0
        # Bytes of the fields of the last block: names, values, and 32 for each.
        self.size = 0
        self._strings: dict[bytes, bytes] = {}
        self._at: i64 = 0

    def decode(self, block: bytes) -> list[Field]:
        """Raises HeaderError."""
        fields: list[Field] = []
        size: i64 = 0
        end: i64 = len(block)
        self._at = 0
        while self._at < end:
            first: i64 = block[self._at]
            if first & _INDEXED:
                field = self._entry(self._integer(block, 7))
            elif first & _LITERAL_INDEXED:
                field = self._literal(block, 6)
                self._add(field)
            elif first & _TABLE_SIZE:
                if size:
                    raise HeaderError("the size of the table changes within a block")
                self._resize(self._integer(block, 5))
                continue
            else:
                field = self._literal(block, 4)
            size += len(field[0]) + len(field[1]) + _FIELD_BYTES
            if size <= self._limit:
                fields.append(field)
        self.size = size
        return fields

    def _literal(self, block: bytes, bits: i64) -> Field:
        index = self._integer(block, bits)
        name = self._entry(index)[0] if index else self._string(block)
        return name, self._string(block)

    def _entry(self, index: i64) -> Field:
        if 0 < index <= _STATIC_COUNT:
            return _STATIC[index]
        place: i64 = len(self._table) - (index - _STATIC_COUNT)
        if index == 0 or place < 0:
            raise HeaderError(f"there is no entry {index} in the table")
        return self._table[place]

    def _integer(self, block: bytes, bits: i64) -> i64:
        end: i64 = len(block)
        mask: i64 = (1 << bits) - 1
        value: i64 = block[self._at] & mask
        self._at += 1
        if value < mask:
            return value
        shift: i64 = 0
        while True:
            if self._at >= end or shift > _MAX_SHIFT:
                raise HeaderError("a number is cut off, or too large")
            byte: i64 = block[self._at]
            self._at += 1
            value += (byte & (_CONTINUES - 1)) << shift
            if byte < _CONTINUES:
                return value
            shift += 7

    def _string(self, block: bytes) -> bytes:
        if self._at >= len(block):
            raise HeaderError("a string is missing")
        is_huffman = block[self._at] & _HUFFMAN != 0
        end: i64 = self._integer(block, 7)
        end += self._at
        if end > len(block):
            raise HeaderError("a string is cut off")
        text = block[self._at : end]
        self._at = end
        if not is_huffman or len(text) > self._longest:
            return text
        known = self._strings.get(text)
        if known is not None:
            return known
        try:
            decoded: bytes = decode_huffman(text)
        except HPACKError as error:
            raise HeaderError(str(error)) from None
        if len(text) <= _KEPT_BYTES:
            if len(self._strings) >= _KEPT_STRINGS:
                self._strings.clear()
            self._strings[text] = decoded
        return decoded

    def _add(self, field: Field) -> None:
        self.changes += 1
        self._table.append(field)
        self._table_bytes += len(field[0]) + len(field[1]) + _FIELD_BYTES
        self._evict()

    def _resize(self, size: i64) -> None:
        if size > TABLE_BYTES:
            raise HeaderError(f"a table of {size} bytes was not offered")
        self.changes += 1
        self._table_limit = size
        self._evict()

    def _evict(self) -> None:
        count: i64 = 0
        while self._table_bytes > self._table_limit:
            name, value = self._table[count]
            self._table_bytes -= len(name) + len(value) + _FIELD_BYTES
            count += 1
        if count:
            del self._table[:count]


_LENGTHS: Final = [bytes((size,)) for size in range(_CONTINUES - 1)]


def encode_field(name: bytes, value: bytes) -> bytes:
    """Returns a literal field that no table keeps."""
    return encode_name(name) + encode_value(value)


def encode_name(name: bytes) -> bytes:
    """Returns the first part of a literal field."""
    return b"\0" + _length(len(name)) + name


def encode_value(value: bytes) -> bytes:
    """Returns the rest of a literal field."""
    return _length(len(value)) + value


def _length(size: int) -> bytes:
    if size < _CONTINUES - 1:
        return _LENGTHS[size]
    encoded = [_CONTINUES - 1]
    size -= _CONTINUES - 1
    while size >= _CONTINUES:
        encoded.append(size % _CONTINUES + _CONTINUES)
        size //= _CONTINUES
    return bytes((*encoded, size))
