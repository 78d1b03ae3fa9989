"""Messages of callers."""

import tempfile
from pathlib import Path

from google.protobuf.message import DecodeError
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.keys.keys import RequestHasher, UncacheableError
from router.request import rows
from services.inference.codec.request import decode_request
from services.inference.codec.request_decoder import RequestDecoder
from services.inference.codec.shared_memory import SharedMemory
from services.inference.models.decisions import overrides_of, request_of
from services.runtime import w3c, wire
from services.runtime.errors import RingmeshError
from services.runtime.oip.infer_request import Head, Read, RequestReader, model_name, request_id, take_apart
from services.runtime.oip.tensors import DATATYPES, decode, encode, raw_from_contents
from services.runtime.request_limits import check_embedded, check_list
from services.runtime.rpc.rpc import parse
from tests import models
from tests.fuzz.target import target
from tests.unit.inference.loaded import load

_FOLDER = tempfile.TemporaryDirectory(prefix="ringmesh-fuzz-models-")


_MODELS = {
    model.name: model
    for model in map(
        load,
        (
            models.add_sub(Path(_FOLDER.name)),
            models.identity(Path(_FOLDER.name), "bytes"),
            models.accumulator(Path(_FOLDER.name)),
        ),
    )
}
_MEMORY = SharedMemory("")
_DECODER = RequestDecoder(_MEMORY)
_HASHER = RequestHasher("secret")


def _request(name, inputs, raws, **more):
    request = v2.ModelInferRequest(model_name=name, raw_input_contents=raws, **more)
    for tensor, datatype, shape in inputs:
        request.inputs.add(name=tensor, datatype=datatype, shape=shape)
    return request


_AB = (("a", "FP32", [2, 2]), ("b", "FP32", [2, 2]))
_TYPED = _request("bytes", [("x", "BYTES", [2, 1])], [])
_TYPED.inputs[0].contents.bytes_contents[:] = [b"ab", b""]
_SEQUENCE = _request("accumulator", [("x", "FP32", [1, 1])], [bytes(4)])
_SEQUENCE.parameters["sequence_id"].int64_param = 7
_SEQUENCE.parameters["sequence_start"].bool_param = True
_CLASSES = _request("add_sub", _AB, [bytes(16), bytes(16)])
_CLASSES.outputs.add(name="sum").parameters["classification"].int64_param = 2
REQUESTS = [
    _request("add_sub", _AB, [bytes(16), bytes(range(16))], id="7").SerializeToString(),
    _request("bytes", [("x", "BYTES", [2, 1])], [b"\1\0\0\0a\0\0\0\0"], model_version="1").SerializeToString(),
    *(request.SerializeToString() for request in (_TYPED, _SEQUENCE, _CLASSES)),
    wire.field(3, b"") + wire.field(7, b"abcd") + wire.field(3, b"2") + wire.field(1, b"x") + b"\xba\0\1a",
    b"\x2a\0\x3a\0" * 20,
]


def parsed(kind, data):
    """None if it is malformed."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def deterministic(message):
    return message.SerializeToString(deterministic=True)


@target("infer-request", REQUESTS, RingmeshError)
def infer_request(data):
    """What is taken apart without a parser is what protobuf parses, and both have one cache key."""
    parts = take_apart(data)
    message = parsed(v2.ModelInferRequest, data)
    if parts is not None:
        assert (message is None) == (parsed(v2.ModelInferRequest, parts.head) is None)
    if parts is not None and message is not None:
        assert (parts.raws, parts.request_id) == ([*message.raw_input_contents], message.id)
        head = v2.ModelInferRequest()
        head.CopyFrom(message)
        head.ClearField("id")
        head.ClearField("raw_input_contents")
        assert deterministic(v2.ModelInferRequest.FromString(parts.head)) == deterministic(head)
        whole = Read(data, Head(v2.ModelInferRequest.FromString(data)), None)
        assert _key(RequestReader().read(data)) == _key(whole)
    if message is not None:
        assert (model_name(data), request_id(data)) == (message.model_name, message.id)
    read = RequestReader().read(data)
    assert message is not None
    assert read.request_id == message.id


def _key(read):
    try:
        return _HASHER.hash_read(read)
    except UncacheableError as why:
        return str(why)


@target("list", [*REQUESTS, wire.field(1, REQUESTS[0]), wire.field(1, b"") * 3], RingmeshError)
def lists(data):
    check_list(data)
    check_embedded(data, 0x0A)


@target("tensors", REQUESTS, RingmeshError)
def tensors(data):
    """A decoder that has seen the kind of request decodes as one that has not; raw and typed contents are equal."""
    read = RequestReader().read(data)
    model = _MODELS.get(read.head.name) or _MODELS["add_sub"]
    first = decode_request(v2.ModelInferRequest.FromString(data), model, _MEMORY)
    for _ in range(2):
        again = _DECODER.decode(read, model)
        assert (again.rows, again.outputs, again.sequence) == (first.rows, first.outputs, first.sequence)
        for name, array in first.arrays.items():
            assert encode(array) == encode(again.arrays[name])
    message = v2.ModelInferRequest.FromString(data)
    for tensor in message.inputs:
        if tensor.HasField("contents") and not message.raw_input_contents:
            raw = raw_from_contents(tensor)
            assert encode(decode(DATATYPES[tensor.datatype], tensor.shape, raw, "x")) == raw
    if (batch := rows.split(message)) is not None:
        joined = rows.smaller(batch, range(len(batch.rows)))
        assert [*joined.raw_input_contents] == [encode(first.arrays[tensor.name]) for tensor in joined.inputs]


_RESPONSE = v2.ModelInferResponse(model_name="m", raw_output_contents=[bytes(8), b"\1\0\0\0a\0\0\0\0"])
_RESPONSE.outputs.add(name="y", datatype="FP32", shape=[2, 1])
_RESPONSE.outputs.add(name="t", datatype="BYTES", shape=[2])


@target("rows", [_RESPONSE.SerializeToString()], rows.UnlikeRowsError, DecodeError)
def cut_rows(data):
    """The rows of an answer are the answer."""
    for count in (1, 2, 3):
        try:
            whole = v2.ModelInferResponse.FromString(rows.join(rows.cut_response(data, count)))
        except rows.UnlikeRowsError:
            continue
        assert whole.raw_output_contents == v2.ModelInferResponse.FromString(data).raw_output_contents


_LOAD = v2.RepositoryModelLoadRequest(model_name="mlp")
_LOAD.parameters["config"].string_param = "{}"
_LOAD.parameters["file:1/model.onnx"].bytes_param = b"onnx"


@target("load-request", [_LOAD.SerializeToString()], RingmeshError, DecodeError)
def load_request(data):
    """What is kept of a decision is what was decided."""
    overrides = overrides_of(v2.RepositoryModelLoadRequest.FromString(data))
    assert overrides_of(request_of("m", overrides)) == overrides


_ITEM = inference_pb2.WorkItem(request=REQUESTS[0], request_hash=b"h" * 16, timeout_us=5, traceparent="00-")


@target("envelope", [inference_pb2.ExecuteRequest(items=[_ITEM] * 2).SerializeToString()], RingmeshError)
def envelope(data):
    """Each item has a trace context, or none."""
    check_list(data)
    for item in parse(inference_pb2.ExecuteRequest, data).items:
        assert len(w3c.packed(item.traceparent)) in (0, 24)
        RequestReader().read(item.request)
