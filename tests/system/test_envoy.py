"""deploy/envoy: REST, gRPC-Web and gRPC through a real Envoy in front of a router."""

import json
import os
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc as v2_grpc

from tests.ports import free_port
from tests.system.conftest import eventually

FOLDER = Path(__file__).parents[2] / "deploy/envoy"
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The configuration of the repository with other ports: config(router's port, own port)."""
    folder = tmp_path_factory.mktemp("envoy")
    descriptor = folder / "inference.pb"
    path = f"{BIN}:{os.environ['PATH']}"
    subprocess.run(
        [sys.executable, FOLDER / "build-descriptor", descriptor], env={**os.environ, "PATH": path}, check=True
    )

    def write(router=8001, port=8000):
        text = (FOLDER / "envoy.yaml").read_text().replace("/etc/envoy/inference.pb", str(descriptor))
        file = folder / f"{port}.yaml"
        file.write_text(text.replace("port_value: 8001", f"port_value: {router}").replace("8000", str(port)))
        return file

    return write


@pytest.fixture
def envoy(config, stack, tmp_path):
    """host:port of an Envoy in front of the stack's router."""
    port = free_port()
    command = [BIN / "envoy", "-c", config(int(stack.router.rpartition(":")[2]), port), "--use-dynamic-base-id"]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        address = f"127.0.0.1:{port}"

        def serves():
            try:
                return get(f"http://{address}/v2/health/ready") == {"ready": True}
            except OSError:
                return False

        eventually(serves)
        yield address
        process.terminate()


def get(url, data=None, content_type="application/json"):
    request = urllib.request.Request(url, data, {"Content-Type": content_type})
    with urllib.request.urlopen(request, timeout=60) as response:
        body = response.read()
    return json.loads(body) if content_type == "application/json" else body


def test_the_configuration_is_valid(config):
    done = subprocess.run([BIN / "envoy", "--mode", "validate", "-c", config()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "OK" in done.stdout + done.stderr


def test_rest_paths_are_translated(envoy):
    assert get(f"http://{envoy}/v2/health/live") == {"live": True}
    metadata = get(f"http://{envoy}/v2/models/mlp")
    assert metadata["name"] == "mlp"
    assert metadata["inputs"][0]["datatype"] == "FP32"
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 64], "contents": {"fp32_contents": [0.5] * 64}}
    for path in ("infer", "versions/1/infer"):
        answer = get(f"http://{envoy}/v2/models/mlp/{path}", json.dumps({"inputs": [tensor]}).encode())
        assert answer["model_name"] == "mlp"
        assert len(answer["raw_output_contents"]) == 1
    index = get(f"http://{envoy}/v2/repository/index", b"{}")
    assert "mlp" in {model["name"] for model in index["models"]}


def test_errors_are_http_statuses(envoy):
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(f"http://{envoy}/v2/models/no-such-model")
    assert caught.value.code == 404
    assert "no-such-model" in caught.value.read().decode()


def test_grpc_web_is_translated(envoy):
    message = v2.ModelReadyRequest(name="mlp").SerializeToString()
    body = get(
        f"http://{envoy}/inference.GRPCInferenceService/ModelReady",
        b"\0" + struct.pack(">I", len(message)) + message,
        "application/grpc-web+proto",
    )
    size = struct.unpack(">I", body[1:5])[0]
    assert v2.ModelReadyResponse.FromString(body[5 : 5 + size]).ready
    assert b"grpc-status:0" in body[5 + size :].replace(b" ", b"")


def test_grpc_passes_through(envoy):
    with grpc.insecure_channel(envoy) as channel:
        stub = v2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ModelReady(v2.ModelReadyRequest(name="mlp"), timeout=60).ready
