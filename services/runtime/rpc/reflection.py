"""Server reflection, v1 and v1alpha, over several descriptor pools."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import grpc
import ringmesh
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2

from services.runtime.request_limits import check_size
from services.runtime.rpc.rpc import Handler


def _v1_pool() -> descriptor_pool.DescriptorPool:
    """Derives the v1 file from v1alpha's by renaming its package; grpcio's reflection package has only v1alpha."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name = "grpc/reflection/v1/reflection.proto"
    file.package = "grpc.reflection.v1"
    for message in file.message_type:
        for field in message.field:
            if field.HasField("type_name"):
                field.type_name = field.type_name.replace(".v1alpha.", ".v1.")
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(".v1alpha.", ".v1.")
        method.output_type = method.output_type.replace(".v1alpha.", ".v1.")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


class _PoolChain:
    """Behaves like one DescriptorPool: the first pool that knows a name answers."""

    def __init__(self, pools: Sequence[descriptor_pool.DescriptorPool]) -> None:
        self._pools = pools

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def find(*arguments: Any) -> Any:
            for pool in self._pools:
                with suppress(KeyError):
                    return getattr(pool, method)(*arguments)
            raise KeyError(arguments)

        return find

    def FindAllExtensions(self, message: Descriptor) -> list[FieldDescriptor]:  # noqa: N802
        return [extension for pool in self._pools for extension in pool.FindAllExtensions(message)]


def _parse(data: bytes) -> reflection_pb2.ServerReflectionRequest:
    """Parses a request. Raises ResourceExhaustedError if it is too large for a request that holds one name."""
    check_size(data)
    return reflection_pb2.ServerReflectionRequest.FromString(data)


def handlers(service_names: Iterable[str]) -> dict[str, dict[str, Handler]]:
    """Returns the handlers of both reflection services, by service name; they list `service_names` and themselves."""
    versions = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
    # Ringmesh's pool first: the default one may hold tritonclient's own `inference.*`.
    pools = _PoolChain([ringmesh.POOL, _v1_pool(), descriptor_pool.Default()])
    servicer: Any = reflection.aio.ReflectionServicer([*service_names, *versions], pool=pools)
    handler: Handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=_parse,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return {version: {"ServerReflectionInfo": handler} for version in versions}
