"""The v2 protocol as real clients speak it: tritonclient, grpcurl, and our own stubs, on router and worker."""

import json
import subprocess

import grpc
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
from ringmesh.health.v1 import health_pb2, health_pb2_grpc
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc as v2_grpc

from tests.system.conftest import GRPCURL

pytestmark = pytest.mark.both_engines

NUMERIC = [
    "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16", "FP32", "FP64",
]  # fmt: skip
TYPED = {
    "BOOL": ("bool_contents", [True, False, True]),
    "INT8": ("int_contents", [-128, 0, 127]),
    "INT16": ("int_contents", [-32768, 0, 32767]),
    "INT32": ("int_contents", [-(2**31), 0, 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 0, 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 1, 255]),
    "UINT16": ("uint_contents", [0, 1, 65535]),
    "UINT32": ("uint_contents", [0, 1, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 1, 2**64 - 1]),
    "FP32": ("fp32_contents", [0.0, -1.5, 3.25]),
    "FP64": ("fp64_contents", [0.0, -1.5, 1e300]),
    "BYTES": ("bytes_contents", [b"", b"abc", "Gr\u00fc\u00dfe".encode()]),
}


def infer(client, model, name, array, datatype, **options):
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return client.infer(model, [tensor], **options)


@pytest.fixture
def stub(address):
    with grpc.insecure_channel(address) as channel:
        yield v2_grpc.GRPCInferenceServiceStub(channel)


def test_tritonclient_finds_server_and_models_live_and_ready(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mlp")
    assert client.is_model_ready("mlp", "1")
    assert not client.is_model_ready("mlp", "9")
    assert not client.is_model_ready("nobody")
    metadata = client.get_server_metadata()
    assert metadata.name == "ringmesh"
    assert {"sequence", "schedule_policy", "classification"} <= set(metadata.extensions)


def test_model_metadata_tells_names_datatypes_and_shapes(client):
    metadata = client.get_model_metadata("mlp")
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("mlp", ["1"], "onnxruntime_onnx")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "FP32", [-1, 64])]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [("y", "FP32", [-1, 10])]


@pytest.mark.parametrize("datatype", NUMERIC)
def test_every_numeric_datatype_travels_raw(client, datatype):
    array = np.arange(6).reshape(2, 3).astype(triton.triton_to_np_dtype(datatype))
    answer = infer(client, f"identity_{datatype.lower()}", "x", array, datatype)
    np.testing.assert_array_equal(answer.as_numpy("y"), array)


def test_bytes_travel_raw(client):
    array = np.array([[b"", b"abc", "Gr\u00fc\u00dfe".encode()]], dtype=object)
    answer = infer(client, "identity_bytes", "x", array, "BYTES")
    assert answer.as_numpy("y").tolist() == array.tolist()


def test_bf16_travels_raw(client):
    array = np.array([[1.0, -2.5, 0.0]], dtype=ml_dtypes.bfloat16)
    answer = infer(client, "identity_bf16", "x", array, "BF16")
    assert answer.as_numpy("y").astype(np.float32).tolist() == [[1.0, -2.5, 0.0]]


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_contents_answer_as_raw_ones_do(stub, datatype):
    field, values = TYPED[datatype]
    request = v2.ModelInferRequest(model_name=f"identity_{datatype.lower()}")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[1, 3])
    getattr(tensor.contents, field).extend(values)
    response = stub.ModelInfer(request)
    (raw,) = response.raw_output_contents
    assert not response.outputs[0].HasField("contents")
    if datatype == "BYTES":
        assert raw == b"".join(len(value).to_bytes(4, "little") + value for value in values)
    else:
        assert raw == np.array(values, dtype=triton.triton_to_np_dtype(datatype)).tobytes()


def test_the_id_comes_back_on_a_miss_and_on_hits(client):
    array = np.random.default_rng().random((1, 64), dtype=np.float32)
    ids = [infer(client, "mlp", "x", array, "FP32", request_id=name).get_response().id for name in ("a", "b" * 300, "")]
    assert ids == ["a", "b" * 300, ""]


def test_the_version_that_ran_is_told(client):
    array = np.zeros((1, 64), np.float32)
    assert infer(client, "mlp", "x", array, "FP32").get_response().model_version == "1"
    assert infer(client, "mlp", "x", array, "FP32", model_version="1").get_response().model_version == "1"


def two_inputs(client, outputs):
    inputs = []
    for name in ("a", "b"):
        tensor = triton.InferInput(name, [1, 2], "FP32")
        tensor.set_data_from_numpy(np.array([[3, 4]], np.float32))
        inputs.append(tensor)
    requested = [triton.InferRequestedOutput(name) for name in outputs]
    return client.infer("add_sub", inputs, outputs=requested or None).get_response()


@pytest.mark.parametrize(
    ("asked", "answered"),
    [([], ["sum", "difference"]), (["difference"], ["difference"]), (["sum"], ["sum"])],
    ids=str,
)
def test_only_requested_outputs_are_answered(client, asked, answered):
    response = two_inputs(client, asked)
    assert [output.name for output in response.outputs] == answered
    assert len(response.raw_output_contents) == len(answered)


def test_classification_answers_the_top_classes(client):
    array = np.random.default_rng(3).random((2, 64), dtype=np.float32)
    tensor = triton.InferInput("x", [2, 64], "FP32")
    tensor.set_data_from_numpy(array)
    scores = infer(client, "mlp", "x", array, "FP32").as_numpy("y")
    top = client.infer("mlp", [tensor], outputs=[triton.InferRequestedOutput("y", class_count=3)]).as_numpy("y")
    expected = np.argsort(-scores, axis=1)[:, :3]
    assert [[int(entry.split(b":")[1]) for entry in row] for row in top.tolist()] == expected.tolist()


def test_reserved_parameters_change_nothing(client):
    array = np.random.default_rng().random((1, 64), dtype=np.float32)
    plain = infer(client, "mlp", "x", array, "FP32").as_numpy("y")
    again = infer(client, "mlp", "x", array, "FP32", priority=1, timeout=10_000_000).as_numpy("y")
    np.testing.assert_array_equal(plain, again)


def grpcurl(address, *arguments):
    done = subprocess.run(
        [GRPCURL, "-plaintext", *arguments[:-1], address, arguments[-1]], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_grpcurl_lists_every_service(address):
    done = subprocess.run([GRPCURL, "-plaintext", address, "list"], capture_output=True, text=True, timeout=60)
    assert {
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "grpc.channelz.v1.Channelz",
    } <= set(done.stdout.split())


@pytest.mark.parametrize(
    "symbol",
    [
        "inference.GRPCInferenceService",
        "inference.ModelInferRequest",
        "grpc.health.v1.Health",
        "grpc.channelz.v1.Channelz",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    ],
)
def test_grpcurl_describes_what_is_served(address, symbol):
    done = subprocess.run(
        [GRPCURL, "-plaintext", address, "describe", symbol], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert symbol in done.stdout


def test_grpcurl_calls_model_infer(address):
    request = {
        "modelName": "mlp",
        "id": "from grpcurl",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 64], "contents": {"fp32Contents": [0.5] * 64}},
        ],
    }
    answer = json.loads(grpcurl(address, "-d", json.dumps(request), "inference.GRPCInferenceService/ModelInfer"))
    assert answer["id"] == "from grpcurl"
    assert answer["outputs"] == [{"name": "y", "datatype": "FP32", "shape": ["1", "10"]}]


def test_grpcurl_asks_health_and_channelz(address):
    health = json.loads(grpcurl(address, "grpc.health.v1.Health/List"))
    assert health["statuses"]["inference.GRPCInferenceService"] == {"status": "SERVING"}
    assert "server" in json.loads(grpcurl(address, "grpc.channelz.v1.Channelz/GetServers"))


def test_health_check_and_watch(address):
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        for service in ("", "inference.GRPCInferenceService"):
            assert stub.Check(health_pb2.HealthCheckRequest(service=service)).status == serving
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == serving
        watch.cancel()
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"), timeout=60)
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        unknown.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_our_descriptors_are_those_of_tritonclient():
    """Same numbers, types and labels wherever both have a field: the wire is the same."""
    from tritonclient.grpc import service_pb2

    theirs = service_pb2.DESCRIPTOR
    for name, message in v2.DESCRIPTOR.message_types_by_name.items():
        _same(message, theirs.message_types_by_name[name])
    (service,) = v2.DESCRIPTOR.services_by_name.values()
    for method in service.methods:
        other = theirs.services_by_name[service.name].methods_by_name[method.name]
        assert (method.input_type.full_name, method.output_type.full_name) == (
            other.input_type.full_name,
            other.output_type.full_name,
        )


def _same(ours, theirs):
    assert ours.full_name == theirs.full_name
    shape = lambda message: {(f.name, f.number, f.type, f.is_repeated) for f in message.fields}  # noqa: E731
    assert shape(ours) == shape(theirs)
    for nested in ours.nested_types:
        _same(nested, theirs.nested_types_by_name[nested.name])
