"""Metadata that a channel of grpc.aio sends with every call, such as a credential."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc


class _Unary(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, name: str, value: str) -> None:
        self._entry = (name, value)

    async def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return await continuation(_with(details, self._entry), request)


class _Stream(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, name: str, value: str) -> None:
        self._entry = (name, value)

    async def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return await continuation(_with(details, self._entry), request)


def sending(name: str, value: str) -> Sequence[grpc.aio.ClientInterceptor]:
    """Returns interceptors that send this metadata with every unary call and every stream of responses; () if `value`
    is ""."""
    return (_Unary(name, value), _Stream(name, value)) if value else ()


def _with(details: Any, entry: tuple[str, str]) -> Any:
    return details._replace(metadata=grpc.aio.Metadata(*(details.metadata or ()), entry))
