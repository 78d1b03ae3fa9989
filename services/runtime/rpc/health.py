"""The standard health service: Check, Watch and List, on both engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import grpc
from ringmesh.health.v1 import health_pb2

from services.runtime.errors import NotFoundError
from services.runtime.request_limits import check_size
from services.runtime.rpc.rpc import Context, Service, parse, unary

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """The serving status of this server as a whole ("") and of each of its services."""

    def __init__(self, services: Iterable[str]) -> None:
        self._names = frozenset(services) | {""}
        # Those of `set_serving(True)`, until the start of a drain.
        self._serving: frozenset[str] = frozenset()
        self._closed = False
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        """Whether this server serves as a whole."""
        return "" in self._serving

    def set_serving(self, serving: bool, but: Iterable[str] = ()) -> None:
        """All names are SERVING, except those in `but`; or all are NOT_SERVING."""
        self._serving = self._names.difference(but) if serving else frozenset()
        self._notify()

    def close(self) -> None:
        """Ends all watches, so that they do not delay the server's stop."""
        self._closed = True
        self._notify()

    def service(self) -> Service:
        return Service(
            health_pb2.DESCRIPTOR.services_by_name["Health"],
            {
                "Check": unary(health_pb2.HealthCheckRequest, self._check),
                "List": unary(health_pb2.HealthListRequest, self._list),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
            },
        )

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, name: str) -> health_pb2.HealthCheckResponse:
        if name not in self._names:
            return health_pb2.HealthCheckResponse(status=_SERVICE_UNKNOWN)
        return health_pb2.HealthCheckResponse(status=_SERVING if name in self._serving else _NOT_SERVING)

    async def _check(self, request: health_pb2.HealthCheckRequest, _: Context) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            known = ", ".join(sorted(self._names - {""}))
            raise NotFoundError(f"no service {request.service!r} here; there are {known}", field="service")
        return self._status(request.service)

    async def _list(self, _: health_pb2.HealthListRequest, __: Context) -> health_pb2.HealthListResponse:
        return health_pb2.HealthListResponse(statuses={name: self._status(name) for name in self._names})

    async def _watch(self, data: bytes, _: Context) -> AsyncIterator[bytes]:
        check_size(data)
        name = parse(health_pb2.HealthCheckRequest, data).service
        last: health_pb2.HealthCheckResponse | None = None
        while not self._closed:
            changed = self._changed
            status = self._status(name)
            if status != last:
                yield status.SerializeToString()
                last = status
            await changed.wait()
