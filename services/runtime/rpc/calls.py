"""Counts of the calls that a server has answered, by method and status code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any, TypeVar

import grpc

from services.runtime.errors import CODE_NAMES, RingmeshError
from services.runtime.rpc.rpc import (
    Answer,
    Context,
    Failure,
    FastPath,
    Handler,
    Metadata,
    Service,
    abort,
    check_metadata,
    metadata,
)
from services.runtime.telemetry.metrics import Family, Sample

CALLS = Family(
    "ringmesh_rpc_calls_total",
    "counter",
    "calls answered, a stream when it ends; on a router without ModelInfer, which ringmesh_requests_total counts",
    ("method", "code"),
)
Checked = TypeVar("Checked")


class Calls:
    """Counts by method and code, at 0.5 us a call; fast paths are counted only by `counted_path` or `counter`."""

    def __init__(self) -> None:
        # By method and code.
        self._counts: dict[str, dict[str, int]] = {}
        self._others: list[Callable[[], Iterator[Sample]]] = []

    def samples(self) -> Iterator[Sample]:
        for method, counts in self._counts.items():
            for code, count in counts.items():
                yield Sample(CALLS, (method, code), count)
        for samples in self._others:
            yield from samples()

    def add(self, samples: Callable[[], Iterator[Sample]]) -> None:
        self._others.append(samples)

    def counted(self, service: Service) -> dict[str, Handler]:
        return {
            method: handler if method in service.fast_paths else self._counted(f"{service.name}/{method}", handler)
            for method, handler in service.handlers.items()
        }

    def counter(self, method: str) -> Callable[[str], None]:
        """Returns a function that counts a call by the name of its status code."""
        counts = self._counts.setdefault(method, {})

        def count(code: str) -> None:
            counts[code] = counts.get(code, 0) + 1

        return count

    def counted_path(self, method: str, path: FastPath) -> FastPath:
        count = self.counter(method)

        async def counted(data: bytes, metadata: Metadata, deadline: float | None) -> Answer | Failure:
            code = "CANCELLED"
            try:
                answer = await path(data, metadata, deadline)
                code = answer.code.name if isinstance(answer, Failure) else "OK"
                return answer
            finally:
                count(code)

        return counted

    def _counted(self, method: str, handler: Handler) -> Handler:
        count = self.counter(method)
        return observed(handler, _check, lambda _, __, ___, code: count(code))


def observed(
    handler: Handler,
    check: Callable[[Any, Context], Awaitable[Checked]],
    ended: Callable[[Checked | None, Any, Context, str], None],
) -> Handler:
    """Returns `handler`, preceded by `check` of the request and the context, which may abort the call.

    `ended` gets what `check` returned (None if it did not), request, context, and the name of the status code.
    """
    parts: Any = handler
    kind = next(kind for kind in ("unary_unary", "unary_stream", "stream_stream") if getattr(parts, kind) is not None)
    answer = getattr(parts, kind)

    async def unary(request: Any, context: Context) -> Any:
        code, checked = "OK", None
        try:
            checked = await check(request, context)
            return await answer(request, context)
        except BaseException as error:
            code = status_of(context, error)
            raise
        finally:
            ended(checked, request, context, code)

    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        code, checked = "OK", None
        try:
            checked = await check(request, context)
            async with aclosing(answer(request, context)) as responses:
                async for response in responses:
                    yield response
        except BaseException as error:
            code = status_of(context, error)
            raise
        finally:
            ended(checked, request, context, code)

    made: Handler = parts._replace(**{kind: unary if kind == "unary_unary" else stream})
    return made


async def _check(_: Any, context: Context) -> None:
    try:
        check_metadata(metadata(context))
    except RingmeshError as error:
        await abort(context, error)


def status_of(context: Context, error: BaseException) -> str:
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return "CANCELLED"
    # grpcio returns a number, or None if no code was set.
    code: Any = context.code()
    return str(code.name) if isinstance(code, grpc.StatusCode) else CODE_NAMES.get(code, "UNKNOWN")
