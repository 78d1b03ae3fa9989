"""The messages of a call whose request is a stream."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import zlib
from collections import deque
from collections.abc import Callable
from typing import Final

from services.runtime.errors import InvalidArgumentError, ResourceExhaustedError

# Of a gRPC message: a flag and its length.
PREFIX_BYTES: Final = 5


class Messages:
    """The messages of a request stream, for one reader."""

    def __init__(self, taken: Callable[[int], None], limit: int) -> None:
        """Calls `taken` with the bytes of each message that the reader takes. `limit`: of one that is expanded."""
        self._taken = taken
        self._limit = limit
        # Each with whether it is compressed: it expands when it is read.
        self._messages: deque[tuple[bytes, bool]] = deque()
        # Bytes of messages that nobody has read, as they were received.
        self.bytes = 0
        self._is_ended = False
        self._waiter: asyncio.Future[None] | None = None

    def add(self, message: bytes, *, is_compressed: bool) -> None:
        self.bytes += len(message) + PREFIX_BYTES
        self._messages.append((message, is_compressed))
        self._wake()

    def end(self) -> None:
        self._is_ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Messages:
        return self

    async def __anext__(self) -> bytes:
        """Raises RingmeshError if the message cannot be expanded."""
        while not self._messages:
            if self._is_ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        message, is_compressed = self._messages.popleft()
        size = len(message) + PREFIX_BYTES
        self.bytes -= size
        self._taken(size)
        if is_compressed:
            return await asyncio.get_running_loop().run_in_executor(None, inflated, message, self._limit)
        return message


def inflated(data: bytes, limit: int) -> bytes:
    """Decompresses gzip. Raises ResourceExhaustedError beyond `limit` bytes, and InvalidArgumentError."""
    inflating = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        message = inflating.decompress(data, limit + 1)
    except zlib.error as error:
        raise InvalidArgumentError(f"a message is not gzip, as its encoding says: {error}") from None
    if len(message) > limit:
        too_large = ResourceExhaustedError(
            f"Received message larger than max ({len(message)} vs. {limit}) when decompressed", kind="too_large"
        )
        too_large.retry_after = None
        raise too_large
    if not inflating.eof:
        raise InvalidArgumentError("a message is gzip that is cut off")
    return message
