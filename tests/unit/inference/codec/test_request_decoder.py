"""A kind of request that was seen before is decoded as one that was not: `decode_request` is the measure."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.codec.request import decode_request, encode_response
from services.inference.codec.request_decoder import MAX_KINDS, RequestDecoder
from services.inference.codec.shared_memory import SharedMemory
from services.runtime.errors import RingmeshError
from services.runtime.oip.infer_request import RequestReader
from tests import models
from tests.unit.inference.loaded import load


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    repository = tmp_path_factory.mktemp("models")
    return {
        "add_sub": load(models.add_sub(repository)),
        "scaled": load(models.scaled(repository)),
        "bytes": load(models.identity(repository, "bytes")),
        "fp32": load(models.identity(repository, "fp32")),
        "accumulator": load(models.accumulator(repository)),
    }


PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.integers(0, 2),
        "timeout": st.integers(0, 5),
        "sequence_id": st.integers(0, 2),
        "whatever": st.integers(0, 1),
    },
)


@st.composite
def requests(draw):
    """Of few kinds, so that many come again; some of them wrong."""
    request = v2.ModelInferRequest(id=draw(st.sampled_from(["", "1", "2"])))
    name, inputs, outputs = draw(
        st.sampled_from(
            [
                ("add_sub", ("a", "b"), ("sum", "difference")),
                ("add_sub", ("b", "a"), ("sum", "difference")),
                ("add_sub", ("a",), ("sum",)),
                ("scaled", ("x",), ("y",)),
                ("scaled", ("x", "scale"), ("y",)),
                ("bytes", ("x",), ("y",)),
                ("fp32", ("x",), ("y",)),
                ("accumulator", ("x",), ("sum",)),
            ]
        )
    )
    rows = draw(st.integers(0, 3))
    for tensor in inputs:
        count = draw(st.sampled_from([rows] * 5 + [1]))
        shape = [1] if tensor == "scale" else [count, 1 if name in ("bytes", "fp32", "accumulator") else 2]
        datatype = "BYTES" if name == "bytes" else "FP32"
        request.inputs.add(name=tensor, datatype=draw(st.sampled_from([datatype] * 9 + ["INT32"])), shape=shape)
        values = draw(st.lists(st.sampled_from([0.0, 1.5, -2.0]), min_size=6, max_size=6))
        if name == "bytes":
            raw = b"".join(b"\x01\0\0\0%d" % abs(int(value)) for value in values[: shape[0] * shape[-1]])
        else:
            raw = np.array(values, np.float32).tobytes()[: 4 * int(np.prod(shape))]
        request.raw_input_contents.append(raw + draw(st.sampled_from([b""] * 9 + [b"\0"])))
    if draw(st.integers(0, 9)) == 0:
        request.raw_input_contents.append(b"")
    for output in outputs:
        if draw(st.booleans()):
            asked = request.outputs.add(name=output)
            if draw(st.integers(0, 4)) == 0:
                asked.parameters["classification"].int64_param = 1
    for key, value in draw(PARAMETERS).items():
        request.parameters[key].int64_param = value
    return name, request


def told(decode, request, model):
    """All that is in the decoded request, or the error."""
    try:
        decoded = decode(request)
    except RingmeshError as error:
        return error.code, error.message, error.field
    arrays = {name: (array.dtype, array.shape, array.tolist()) for name, array in decoded.arrays.items()}
    # A request that runs alone has a signature of its own.
    signature = decoded.signature if isinstance(decoded.signature, tuple) else "its own"
    return (
        arrays, decoded.rows, decoded.outputs, dict(decoded.classes), signature, decoded.priority, decoded.timeout_us,
        decoded.sequence,
    )  # fmt: skip


def decode(decoder, request, model):
    return decoder.decode(RequestReader().read(request.SerializeToString()), model)


@given(st.lists(requests(), min_size=2, max_size=12))
def test_it_decodes_whatever_comes_before_as_if_it_were_the_first(loaded, sent):
    memory = SharedMemory()
    decoder = RequestDecoder(memory)
    for name, request in sent:
        model = loaded[name]
        copy = v2.ModelInferRequest()
        copy.CopyFrom(request)
        plainly = told(lambda made, model=model: decode_request(made, model, memory), copy, model)
        assert told(lambda made, model=model: decode(decoder, made, model), request, model) == plainly


def test_a_kind_is_remembered_once_for_each_model_whatever_its_data_and_id(loaded):
    decoder = RequestDecoder(SharedMemory())
    for value in (1.0, 2.0, 3.0):
        for name in ("fp32", "scaled"):
            request = v2.ModelInferRequest(id=str(value), raw_input_contents=[np.full(2, value, np.float32).tobytes()])
            request.inputs.add(name="x", datatype="FP32", shape=[2, 1] if name == "fp32" else [1, 2])
            assert decode(decoder, request, loaded[name]).arrays["x"].ravel().tolist() == [value, value]
    assert len(decoder._kinds) == 2


def test_a_request_that_runs_alone_does_so_every_time(loaded):
    request = v2.ModelInferRequest(raw_input_contents=[bytes(16), bytes(8)])
    request.inputs.add(name="a", datatype="FP32", shape=[2, 2])
    request.inputs.add(name="b", datatype="FP32", shape=[1, 2])
    decoder = RequestDecoder(SharedMemory())
    assert len({decode(decoder, request, loaded["add_sub"]).signature for _ in range(3)}) == 3


def test_what_it_remembers_is_bounded(loaded):
    decoder = RequestDecoder(SharedMemory())
    for number in range(MAX_KINDS + 10):
        request = v2.ModelInferRequest(raw_input_contents=[bytes(4)])
        request.inputs.add(name="x", datatype="FP32", shape=[1, 1])
        request.parameters["number"].int64_param = number
        decode(decoder, request, loaded["fp32"])
    assert len(decoder._kinds) <= MAX_KINDS


@pytest.mark.parametrize("size", [0, 1, 127, 128, 300, 70_000])
def test_a_response_reads_as_it_was_written(loaded, size):
    model = loaded["fp32"]
    request = v2.ModelInferRequest(raw_input_contents=[bytes(4 * size)])
    request.inputs.add(name="x", datatype="FP32", shape=[size, 1])
    decoded = decode_request(request, model, SharedMemory())
    array = np.arange(size, dtype=np.float32).reshape(size, 1)
    response = v2.ModelInferResponse.FromString(encode_response(model, decoded, [array]))
    assert (response.model_name, response.model_version) == (model.name, "1")
    assert [(out.name, out.datatype, list(out.shape)) for out in response.outputs] == [("y", "FP32", [size, 1])]
    assert list(response.raw_output_contents) == [array.tobytes()]
