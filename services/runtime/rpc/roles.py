"""The roles of callers, and the one that each method needs."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class Role(StrEnum):
    """What a caller may do. ADMIN includes all others."""

    INFER = "infer"
    READ = "read"
    OPERATE = "operate"
    ADMIN = "admin"


V2: Final = "inference.GRPCInferenceService"
_ROUTER, _LEDGER = "ringmesh.router.v1.RouterService", "ringmesh.ledger.v1.LedgerService"
_CACHE, WORKER = "ringmesh.cache.v1.CacheService", "ringmesh.inference.v1.InferenceWorkerService"


def _methods(service: str, names: str) -> list[str]:
    return [f"{service}/{name}" for name in names.split()]


# Methods that need no role: probes and the exporters of OpenTelemetry have no credential.
_OPEN = frozenset(
    {
        *_methods("grpc.health.v1.Health", "Check List Watch"),
        *_methods(V2, "ServerLive ServerReady"),
        "opentelemetry.proto.collector.trace.v1.TraceService/Export",
    }
)
# Methods whose requests name a model.
OF_A_MODEL = frozenset(
    _methods(V2, "ModelReady ModelMetadata ModelConfig ModelStatistics")
    + _methods(V2, "RepositoryModelLoad RepositoryModelUnload TraceSetting")
)
INFERENCES = frozenset(_methods(V2, "ModelInfer ModelStreamInfer"))
_ROLES: Mapping[str, Role] = {
    method: role
    for role, methods in (
        (Role.INFER, _methods(V2, "ModelInfer ModelStreamInfer ServerMetadata ModelReady ModelMetadata")),
        (Role.INFER, _methods(_CACHE, "Get GetMany Put GetOrCompute Release Delete")),
        (Role.READ, _methods(V2, "ModelConfig ModelStatistics RepositoryIndex")),
        (Role.READ, _methods(V2, "SystemSharedMemoryStatus CudaSharedMemoryStatus")),
        (Role.READ, [*_methods(_ROUTER, "GetRing Watch"), *_methods(_CACHE, "Stats Watch"), f"{WORKER}/Describe"]),
        (Role.OPERATE, _methods(V2, "RepositoryModelLoad RepositoryModelUnload TraceSetting LogSettings")),
        (Role.OPERATE, _methods(V2, "SystemSharedMemoryRegister SystemSharedMemoryUnregister")),
        (Role.OPERATE, _methods(V2, "CudaSharedMemoryRegister CudaSharedMemoryUnregister")),
        (Role.READ, _methods(_LEDGER, "Report Bill Forecast Export ListPrices ListBudgets Advise")),
        (Role.OPERATE, _methods(_LEDGER, "SetPrice DeletePrice SetBudget DeleteBudget Rebuild")),
        (Role.OPERATE, [f"{_ROUTER}/Explain", *_methods(_CACHE, "Purge Warm")]),
        (Role.OPERATE, _methods("grpc.reflection.v1.ServerReflection", "ServerReflectionInfo")),
        (Role.OPERATE, _methods("grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo")),
    )
    for method in methods
}


def role_of(method: str) -> Role | None:
    """The role that `package.Service/Method` needs; None if it is open to everyone. Unknown methods need ADMIN."""
    return None if method in _OPEN else _ROLES.get(method, Role.ADMIN)
