"""ModelStreamInfer, as the router and the workers serve it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime import wire
from services.runtime.errors import RingmeshError
from services.runtime.infer_request import parse_request
from services.runtime.protocol import metadata
from services.runtime.rpc import Answer, Context, Handler, abort, unexpected

log = logging.getLogger(__name__)

# Requests of one stream under way at once; the rest is read when an answer has left.
_DEPTH = 256
# A serialized parameter of ModelInferResponse: this is the last response to its request.
_FINAL = v2.ModelInferResponse(
    parameters={"triton_final_response": v2.InferParameter(bool_param=True)}
).SerializeToString()


def stream_handler(infer: Callable[[bytes, Context], Awaitable[Answer]]) -> Handler:
    """ModelStreamInfer around `infer`: requests run side by side, answers leave in the order of the requests.

    An error ends its request and not the stream, unless the caller sent `triton_grpc_error: true`. What is still
    running when the caller leaves is cancelled.
    """

    async def answer(data: bytes, context: Context, strict: bool) -> bytes:
        request = _id_and_flag(data)
        try:
            answered = await infer(data, context)
        except RingmeshError as error:
            if strict:
                raise
            failed = v2.ModelStreamInferResponse(error_message=error.message)
            failed.infer_response.id = request.id
            return failed.SerializeToString()
        except Exception as error:
            log.exception("a streamed request failed")
            return v2.ModelStreamInferResponse(error_message=unexpected(error).message).SerializeToString()
        parts = [answered.body, *answered.pieces]
        if request.parameters["triton_enable_empty_final_response"].bool_param:
            parts.append(_FINAL)
        parts.insert(0, wire.head(2, sum([len(part) for part in parts])))
        return await asyncio.to_thread(b"".join, parts) if answered.is_large else b"".join(parts)

    async def stream(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        strict = ("triton_grpc_error", "true") in metadata(context)
        running: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(_DEPTH)
        tasks: set[asyncio.Task[bytes]] = set()

        async def read() -> None:
            try:
                async for data in requests:
                    task = asyncio.create_task(answer(data, context, strict))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    await running.put(task)
            except Exception as error:
                log.debug("a stream ended: %s", error)
            await running.put(None)

        reader = asyncio.create_task(read())
        try:
            while (task := await running.get()) is not None:
                yield await task
            await reader
        except RingmeshError as error:
            await abort(context, error)
        finally:
            for left in (reader, *tasks):
                left.cancel()

    return grpc.stream_stream_rpc_method_handler(stream)


def _id_and_flag(data: bytes) -> v2.ModelInferRequest:
    """The request, for its id and stream flag; an empty one where it cannot be read, which `infer` will say."""
    try:
        return parse_request(data)
    except RingmeshError:
        return v2.ModelInferRequest()
