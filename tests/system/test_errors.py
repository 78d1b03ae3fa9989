"""Bad input gets the right status and a message that names the field and what it should be; the server goes on."""

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from ringmesh.oip.v2 import grpc_service_pb2 as v2

pytestmark = pytest.mark.both_engines

INFER = "/inference.GRPCInferenceService/ModelInfer"
INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


@pytest.fixture
def channel(address):
    with grpc.insecure_channel(address) as channel:
        yield channel


def good(**fields):
    request = v2.ModelInferRequest(model_name="mlp", **fields)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 64])
    request.raw_input_contents.append(bytes(256))
    return request


def call(channel, body, timeout=60):
    return channel.unary_unary(INFER)(body, timeout=timeout)


def refused(channel, body):
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, body)
    assert "Traceback" not in caught.value.details()
    return caught.value


def change(**changes):
    def apply(request):
        for path, value in changes.items():
            tensor = request.inputs[0]
            if path == "shape":
                tensor.shape[:] = value
            elif path in ("name", "datatype"):
                setattr(tensor, path, value)
            elif path == "raw":
                request.raw_input_contents[:] = value
            elif path == "fp32":
                tensor.contents.fp32_contents.extend(value)
            elif path == "int":
                tensor.contents.int_contents.extend(value)
            elif path == "outputs":
                for name in value:
                    request.outputs.add(name=name)
            else:
                setattr(request, path, value)

    return apply


CASES = {
    "unknown model": (change(model_name="nobody"), NOT_FOUND, ["nobody"], "model_name"),
    "empty model name": (change(model_name=""), NOT_FOUND, ["''"], "model_name"),
    "misspelt model name": (change(model_name="add-sub"), NOT_FOUND, ["add-sub", "'add_sub'?"], "model_name"),
    "endless model name": (change(model_name="m" * 300), NOT_FOUND, ["mmm"], "model_name"),
    "unknown version": (change(model_version="7"), NOT_FOUND, ["7", "1"], "model_version"),
    "version that is no number": (change(model_version="one"), INVALID, ["one", "whole number"], "model_version"),
    "unknown input": (change(name="z"), INVALID, ["z", "x"], "inputs[0].name"),
    "wrong datatype": (change(datatype="INT32"), INVALID, ["INT32", "FP32"], "inputs[0].datatype"),
    "no such datatype": (change(datatype="FLOAT"), INVALID, ["FLOAT", "FP32"], "inputs[0].datatype"),
    "wrong dimension": (change(shape=[1, 63], raw=[bytes(252)]), INVALID, ["63", "64"], "inputs[0].shape"),
    "wrong rank": (change(shape=[64]), INVALID, ["[64]", "64"], "inputs[0].shape"),
    "negative dimension": (change(shape=[-1, 64]), INVALID, ["-1"], "inputs[0].shape"),
    "immense dimension": (change(shape=[2**62, 64]), INVALID, [str(2**62)], None),
    "too few bytes": (change(raw=[bytes(252)]), INVALID, ["252", "256"], None),
    "too many bytes": (change(raw=[bytes(260)]), INVALID, ["260", "256"], None),
    "too many raw contents": (change(raw=[bytes(256)] * 2), INVALID, ["2", "1"], "raw_input_contents"),
    "no contents": (change(raw=[]), INVALID, ["x"], None),
    "too few elements": (change(raw=[], fp32=[1.0] * 63), INVALID, ["63", "64"], None),
    "contents of another type": (change(raw=[], int=[1] * 64), INVALID, ["int_contents", "fp32_contents"], None),
    "raw and typed contents": (change(fp32=[1.0] * 64), INVALID, ["raw", "x"], None),
    "unknown output": (change(outputs=["z"]), INVALID, ["z", "y"], "outputs[0].name"),
    "output asked twice": (change(outputs=["y", "y"]), INVALID, ["y"], "outputs[1].name"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_request_is_told_what_is_wrong_and_what_would_be_right(channel, case):
    apply, code, words, field = CASES[case]
    request = good()
    apply(request)
    error = refused(channel, request.SerializeToString())
    assert error.code() == code
    for word in words:
        assert word in error.details()
    if field is not None:
        status = rpc_status.from_call(error)
        details = error_details_pb2.BadRequest()
        assert status.details[0].Unpack(details)
        assert details.field_violations[0].field == field
    assert len(call(channel, good().SerializeToString())) > 0


def test_a_missing_input_is_named(channel):
    request = v2.ModelInferRequest(model_name="add_sub")
    request.inputs.add(name="a", datatype="FP32", shape=[1, 2])
    request.raw_input_contents.append(bytes(8))
    error = refused(channel, request.SerializeToString())
    assert error.code() == INVALID
    assert "b" in error.details()


def test_an_input_given_twice_is_named(channel):
    request = good()
    request.inputs.add().CopyFrom(request.inputs[0])
    request.raw_input_contents.append(bytes(256))
    error = refused(channel, request.SerializeToString())
    assert error.code() == INVALID
    assert "twice" in error.details()
    assert "'x'" in error.details()


def test_bytes_with_a_length_beyond_the_end_are_refused(channel):
    request = v2.ModelInferRequest(model_name="identity_bytes")
    request.inputs.add(name="x", datatype="BYTES", shape=[1, 1])
    request.raw_input_contents.append((1000).to_bytes(4, "little") + b"abc")
    error = refused(channel, request.SerializeToString())
    assert error.code() == INVALID
    assert "1000" in error.details()


@pytest.mark.parametrize("body", [b"\xff" * 64, b"garbage", b"\x0a\x7fmlp"], ids=["ff", "text", "truncated"])
def test_garbage_is_refused_by_name(channel, body):
    error = refused(channel, body)
    assert error.code() == INVALID
    assert "inference.ModelInferRequest" in error.details()
    assert len(call(channel, good().SerializeToString())) > 0


def test_a_message_above_the_limit_is_refused_with_both_sizes(channel, stack):
    request = good(id="x" * stack.max_message_bytes)
    error = refused(channel, request.SerializeToString())
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(stack.max_message_bytes) in error.details()
    assert len(call(channel, good().SerializeToString())) > 0


def test_an_expired_deadline_is_told_as_such(channel):
    slow = v2.ModelInferRequest(model_name="slow")
    slow.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    slow.raw_input_contents.append(np.random.default_rng().random((1, 1), np.float32).tobytes())
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, slow.SerializeToString(), timeout=0.05)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(call(channel, good().SerializeToString())) > 0


def test_an_unknown_method_is_unimplemented(channel):
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/inference.GRPCInferenceService/Nothing")(b"", timeout=60)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_an_error_carries_the_trace_id(stack):
    with grpc.insecure_channel(stack.router) as channel:
        error = refused(channel, v2.ModelInferRequest(model_name="nobody").SerializeToString())
    assert len(dict(error.trailing_metadata())["ringmesh-trace-id"]) == 32
