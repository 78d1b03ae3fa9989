"""Shapes that a model cannot take: the caller is told so, whether the protocol or a node of the model refuses."""

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc

from tests.models import save, value
from tests.system import processes

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    flat = value("x", FLOAT, "n"), value("y", FLOAT, "n")
    unranked = [helper.make_tensor_value_info(name, FLOAT, None) for name in "xy"]
    identity = helper.make_node("Identity", ["x"], ["y"])
    save(folder, "flat", [identity], [flat[0]], [flat[1]])
    for name in ("unranked", "undeclared"):
        save(folder, name, [identity], unranked[:1], unranked[1:])
    (folder / "unranked/config.pbtxt").write_text('input { name: "x" data_type: TYPE_FP32 dims: [ -1, 2 ] }')
    reshape = helper.make_node("Reshape", ["x", "s"], ["y"], name="the node")
    save(folder, "reshaped", [reshape], [flat[0], value("s", INT64, "k")], unranked[1:])
    return folder


@pytest.fixture(scope="module")
def addresses(repository):
    worker = processes.start("services.inference", models=repository, engine="native", threads=1)
    router = processes.start("router", workers=worker.address, engine="native")
    yield {"router": router.address, "worker": worker.address}
    processes.stop(router, worker)


@pytest.fixture(params=["router", "worker"])
def stub(request, addresses):
    with grpc.insecure_channel(addresses[request.param]) as channel:
        yield grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)


def asked(model, shape, **more):
    """x of `shape`, ones, where a negative size stands for one; `more`: other inputs."""
    request = v2.ModelInferRequest(model_name=model)
    for name, array in {"x": np.ones([abs(size) for size in shape], np.float32), **more}.items():
        datatype = "FP32" if array.dtype == np.float32 else "INT64"
        request.inputs.add(name=name, datatype=datatype, shape=shape if name == "x" else array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request


def refused(stub, request):
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request, timeout=60)
    assert caught.value.code() == INVALID
    return caught.value.details()


def test_a_request_with_a_free_size_is_told_to_send_the_size_of_its_data(stub):
    assert refused(stub, asked("flat", [-1])) == (
        "input 'x' has shape [-1]; the dimensions of a request are the sizes of its data, 0 or more, as in [1]; the "
        "model takes [-1], where -1 stands for any size from 0"
    )
    assert [*stub.ModelInfer(asked("flat", [1])).outputs[0].shape] == [1]


def test_a_reshape_that_the_shape_of_the_caller_makes_impossible_is_the_callers_error(stub):
    told = refused(stub, asked("reshaped", [3], s=np.array([2, 2])))
    assert "model 'reshaped' cannot run on these inputs: node 'the node' (Reshape) fails: The input tensor" in told
    assert [*stub.ModelInfer(asked("reshaped", [4], s=np.array([2, 2]))).outputs[0].shape] == [2, 2]


def test_an_input_whose_rank_the_file_leaves_open_has_that_of_the_configuration(stub):
    assert refused(stub, asked("unranked", [2])).startswith("input 'x' has shape [2]; the model takes [-1, 2]")
    response = stub.ModelInfer(asked("unranked", [3, 2]))
    assert [*response.outputs[0].shape] == [3, 2]
    assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [1] * 6


def test_without_a_configuration_it_does_not_load_and_the_caller_is_told_why(stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(asked("undeclared", [3, 2]), timeout=60)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "the file does not say how many dimensions input 'x' has; config.pbtxt has to" in caught.value.details()
