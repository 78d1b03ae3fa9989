"""The OTLP/gRPC receiver: stores the spans of every process in the trace store."""

from __future__ import annotations

import asyncio

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from services.console.data.trace_store import TraceStore
from services.runtime.request_limits import check_list
from services.runtime.rpc.rpc import Context, Service, unary

_Request = trace_service_pb2.ExportTraceServiceRequest
_Response = trace_service_pb2.ExportTraceServiceResponse
# Spans stored between two turns of the event loop, about 5 ms.
_TURN = 256


class TraceReceiver:
    """`opentelemetry.proto.collector.trace.v1.TraceService`."""

    def __init__(self, store: TraceStore) -> None:
        self._store = store

    def service(self) -> Service:
        descriptor = trace_service_pb2.DESCRIPTOR.services_by_name["TraceService"]
        return Service(descriptor, {"Export": unary(_Request, self._export, check_list)})

    async def _export(self, request: _Request, _: Context) -> _Response:
        response = _Response()
        rejected = response.partial_success
        received = 0
        for resource in request.resource_spans:
            attributes = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
            service = attributes.get("service.name", "unknown")
            for scope in resource.scope_spans:
                for span in scope.spans:
                    received += 1
                    if received % _TURN == 0:
                        await asyncio.sleep(0)
                    try:
                        if not self._store.add(service, span):
                            raise ValueError(f"trace {span.trace_id.hex()} is full")
                    except ValueError as error:
                        rejected.rejected_spans += 1
                        rejected.error_message = str(error)
        return response
