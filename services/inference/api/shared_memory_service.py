"""The part of the v2 protocol that manages shared memory."""

from __future__ import annotations

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
            "CudaSharedMemoryStatus": unary(v2.CudaSharedMemoryStatusRequest, self._cuda_status),
            "CudaSharedMemoryRegister": unary(v2.CudaSharedMemoryRegisterRequest, self._cuda_register),
            "CudaSharedMemoryUnregister": unary(v2.CudaSharedMemoryUnregisterRequest, self._cuda_unregister),
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

    async def _cuda_status(
        self, request: v2.CudaSharedMemoryStatusRequest, _: Context
    ) -> v2.CudaSharedMemoryStatusResponse:
        if request.name:
            raise _NO_CUDA
        return v2.CudaSharedMemoryStatusResponse()

    async def _cuda_register(
        self, _: v2.CudaSharedMemoryRegisterRequest, __: Context
    ) -> v2.CudaSharedMemoryRegisterResponse:
        raise _NO_CUDA

    async def _cuda_unregister(
        self, request: v2.CudaSharedMemoryUnregisterRequest, _: Context
    ) -> v2.CudaSharedMemoryUnregisterResponse:
        """Succeeds if no region is named: perf_analyzer starts with this call, whatever memory it uses."""
        if request.name:
            raise _NO_CUDA
        return v2.CudaSharedMemoryUnregisterResponse()


_NO_CUDA = UnimplementedError("CUDA shared memory is not served here; system shared memory is")
