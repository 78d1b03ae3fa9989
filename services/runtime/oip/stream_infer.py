"""ModelStreamInfer, as the router and the workers serve it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime import faults, wire
from services.runtime.errors import ResourceExhaustedError, RingmeshError
from services.runtime.oip.infer_request import parse_request
from services.runtime.rpc.rpc import Answer, Context, Handler, abort, metadata

log = logging.getLogger(__name__)

# Concurrent requests of one stream; further requests are read when an answer has been sent.
_DEPTH = 256
# Bytes of answers that clients have not read. Above the first limit, no more requests of that stream are read. Above
# the second, for all streams together, requests are refused.
_UNREAD_OF_ONE = 16 << 20
_UNREAD = 256 << 20
# A serialized parameter of ModelInferResponse that marks the last response to a request.
_FINAL = v2.ModelInferResponse(
    parameters={"triton_final_response": v2.InferParameter(bool_param=True)}
).SerializeToString()


def stream_handler(infer: Callable[[bytes, Context], Awaitable[Answer]]) -> Handler:
    """Returns a handler of ModelStreamInfer around `infer`: requests run concurrently, answers keep their order.

    An error ends its request and not the stream, unless the caller sent `triton_grpc_error: true`. Requests still
    running when the caller leaves are cancelled.
    """
    return grpc.stream_stream_rpc_method_handler(_Streams(infer).serve)


class _Streams:
    def __init__(self, infer: Callable[[bytes, Context], Awaitable[Answer]]) -> None:
        self._infer = infer
        self._unread = _Unread()

    async def serve(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        strict = ("triton_grpc_error", "true") in metadata(context)
        running: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(_DEPTH)
        tasks: set[asyncio.Task[bytes]] = set()
        mine = _Unread(self._unread)

        def ended(task: asyncio.Task[bytes]) -> None:
            tasks.discard(task)
            if not task.cancelled() and task.exception() is None:
                mine.add(len(task.result()))

        async def read() -> None:
            try:
                async for data in requests:
                    task = asyncio.create_task(self._answer(data, context, strict))
                    tasks.add(task)
                    task.add_done_callback(ended)
                    await running.put(task)
                    await mine.below(_UNREAD_OF_ONE)
            except Exception as error:
                log.debug("a stream ended: %s", error)
            await running.put(None)

        reader = asyncio.create_task(read())
        try:
            while (task := await running.get()) is not None:
                response = await task
                yield response
                mine.add(-len(response))
            await reader
        except RingmeshError as error:
            await abort(context, error)
        finally:
            for left in (reader, *tasks):
                left.cancel()
            mine.close()

    async def _answer(self, data: bytes, context: Context, strict: bool) -> bytes:
        """The serialized ModelStreamInferResponse. Raises RingmeshError if `strict`."""
        request = _id_and_flag(data)
        try:
            answered = await self._infer(data, context)
            if self._unread.bytes > _UNREAD:
                raise ResourceExhaustedError("too many streamed answers are not read yet; retry later", kind="unread")
        except RingmeshError as error:
            if strict:
                raise
            failed = v2.ModelStreamInferResponse(error_message=error.message)
            failed.infer_response.id = request.id
            return failed.SerializeToString()
        except Exception as error:
            fault = faults.internal(log, "a streamed request failed", error)
            return v2.ModelStreamInferResponse(error_message=fault.message).SerializeToString()
        parts = [answered.body, *answered.pieces]
        if request.parameters["triton_enable_empty_final_response"].bool_param:
            parts.append(_FINAL)
        parts.insert(0, wire.head(2, sum([len(part) for part in parts])))
        return await asyncio.to_thread(b"".join, parts) if answered.is_large else b"".join(parts)


class _Unread:
    """Counts bytes of unread answers, also in the total `whole`, until `close`."""

    def __init__(self, whole: _Unread | None = None) -> None:
        self.bytes = 0
        self._whole = whole
        self._less = asyncio.Event()

    def add(self, count: int) -> None:
        self.bytes += count
        if self._whole is not None:
            self._whole.add(count)
        if count < 0:
            self._less.set()

    async def below(self, limit: int) -> None:
        while self.bytes > limit:
            self._less.clear()
            await self._less.wait()

    def close(self) -> None:
        self.add(-self.bytes)
        self._whole = None


def _id_and_flag(data: bytes) -> v2.ModelInferRequest:
    """Returns the request, for its id and stream flag; an empty one if it is malformed, which `infer` reports."""
    try:
        return parse_request(data)
    except RingmeshError:
        return v2.ModelInferRequest()
