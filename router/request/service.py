"""`inference.GRPCInferenceService` on the router."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Mapping

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from router.dispatch.attempts import Workers
from router.request.path import RequestPath
from services.runtime import driver
from services.runtime.errors import NotFoundError, UnavailableError
from services.runtime.oip import protocol
from services.runtime.oip.stream_infer import stream_handler
from services.runtime.rpc.rpc import Answer, Context, Failure, Handler, Service, metadata, unary


class InferenceService:
    """Serves inference from `path`, and model readiness and metadata from `fleet`."""

    def __init__(self, fleet: Workers, path: RequestPath) -> None:
        self._fleet = fleet
        self._path = path

    def service(self, is_ready: protocol.ReadyCheck, control: Mapping[str, Handler]) -> Service:
        """The handlers, including `control` of the same service. `is_ready` answers ServerReady."""
        return protocol.service(
            is_ready,
            {
                "ModelReady": unary(v2.ModelReadyRequest, self._model_ready),
                "ModelMetadata": unary(v2.ModelMetadataRequest, self._model_metadata),
                "ModelStreamInfer": stream_handler(self._stream_infer),
                **control,
            },
            {"ModelInfer": self._path.infer},
        )

    async def _model_ready(self, request: v2.ModelReadyRequest, _: Context) -> v2.ModelReadyResponse:
        return v2.ModelReadyResponse(ready=self._is_ready(request.name, request.version))

    def _is_ready(self, name: str, version: str) -> bool:
        try:
            model = self._fleet.view.catalog.find(name, version)
        except (NotFoundError, UnavailableError):
            return False
        if any(member.can_run(model) for member in self._fleet.view.members.values()):
            return True
        steps = model.plan.steps if model.plan is not None else ()
        return bool(steps) and all(
            self._is_ready(step.model, step.version)  # compiled: a step is never an ensemble, see Catalog
            for step in steps
        )

    async def _model_metadata(self, request: v2.ModelMetadataRequest, _: Context) -> v2.ModelMetadataResponse:
        return self._fleet.view.catalog.find(request.name, request.version).metadata

    async def _stream_infer(self, data: bytes, context: Context) -> Answer:
        deadline = protocol.deadline(context)
        call = self._path.open(data, metadata(context), deadline, "ModelStreamInfer")
        answer = await driver.run(self._path.answer(call), deadline)
        if answer.afterwards is not None:
            answer.afterwards()
        if isinstance(answer, Failure):
            assert call.error is not None
            raise call.error
        return answer
