"""What probes of readiness and liveness see of a worker whose models fail to load."""

import re
from pathlib import Path

import grpc
import pytest
import tritonclient.grpc as triton
import yaml
from ringmesh.health.v1 import health_pb2, health_pb2_grpc
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc

from tests import models
from tests.system.test_cache import fresh

OPERATIONS = Path(__file__).parents[2] / "docs/operations.md"
V2 = "inference.GRPCInferenceService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def documented(probe):
    """The service that a probe of the documented container asks for."""
    (block,) = re.findall(r"^```yaml\n(startupProbe:.*?)^```$", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL)
    return yaml.safe_load(block)[probe]["grpc"].get("service", "")


def statuses(address):
    with grpc.insecure_channel(address) as channel:
        listed = health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=60).statuses
        ready = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerReady(v2.ServerReadyRequest(), timeout=60)
    assert ready.ready == (listed[""].status == SERVING)
    return [listed[name].status for name in (documented("readinessProbe"), V2, documented("livenessProbe"))]


def test_a_worker_none_of_whose_models_load_is_not_ready_but_alive_until_one_does(start_worker, start_router, tmp_path):
    (models.mlp(tmp_path) / "model.onnx").write_bytes(b"no model")
    worker = start_worker("worker-a", models=tmp_path, service=documented("startupProbe"))
    assert statuses(worker.address) == [NOT_SERVING, NOT_SERVING, SERVING]
    router = start_router([worker.address], None)
    with triton.InferenceServerClient(router.address) as client, grpc.insecure_channel(router.address) as channel:
        (line,) = client.get_model_repository_index().models
        assert (line.name, line.state) == ("mlp", "UNAVAILABLE")
        assert "it is no ONNX model" in line.reason
        with pytest.raises(grpc.RpcError) as caught:
            grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(fresh(), timeout=60)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "it is no ONNX model" in caught.value.details()
        models.mlp(tmp_path)
        client.load_model("mlp")
        assert statuses(worker.address) == [SERVING, SERVING, SERVING]
        client.unload_model("mlp")
        assert statuses(worker.address) == [SERVING, SERVING, SERVING]
