"""The part of the v2 protocol that manages shared memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.message import Message
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.codec.shared_memory import SharedMemory
from services.runtime.errors import UnimplementedError
from services.runtime.rpc.rpc import Context, Handler, unary


class SharedMemoryControl:
    """Handlers that manage the shared memory regions of this worker."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory

    def handlers(self) -> dict[str, Handler]:
        return {
            "SystemSharedMemoryStatus": unary(v2.SystemSharedMemoryStatusRequest, self._status),
            "SystemSharedMemoryRegister": unary(v2.SystemSharedMemoryRegisterRequest, self._register),
            "SystemSharedMemoryUnregister": unary(v2.SystemSharedMemoryUnregisterRequest, self._unregister),
            **{
                method: unary(getattr(v2, f"{method}Request"), _without_cuda(getattr(v2, f"{method}Response")))
                for method in ("CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister")
            },
        }

    async def _status(
        self, request: v2.SystemSharedMemoryStatusRequest, _: Context
    ) -> v2.SystemSharedMemoryStatusResponse:
        status = v2.SystemSharedMemoryStatusResponse.RegionStatus
        return v2.SystemSharedMemoryStatusResponse(
            regions={
                region.name: status(name=region.name, key=region.key, offset=region.offset, byte_size=region.byte_size)
                for region in self._memory.status(request.name)
            }
        )

    async def _register(
        self, request: v2.SystemSharedMemoryRegisterRequest, _: Context
    ) -> v2.SystemSharedMemoryRegisterResponse:
        self._memory.register(request.name, request.key, request.offset, request.byte_size)
        return v2.SystemSharedMemoryRegisterResponse()

    async def _unregister(
        self, request: v2.SystemSharedMemoryUnregisterRequest, _: Context
    ) -> v2.SystemSharedMemoryUnregisterResponse:
        self._memory.unregister(request.name)
        return v2.SystemSharedMemoryUnregisterResponse()


def _without_cuda(response_type: type[Message]) -> Callable[[Any, Context], Awaitable[Message]]:
    """Succeeds if no region is named: perf_analyzer unregisters all regions first, whatever memory it uses."""

    async def handle(request: Any, _: Context) -> Message:
        if request.name or response_type is v2.CudaSharedMemoryRegisterResponse:
            raise UnimplementedError("CUDA shared memory is not served here; system shared memory is")
        return response_type()

    return handle
