import asyncio
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.codec.request import decode_request as decode_request_with
from services.inference.codec.request import encode_response
from services.inference.codec.shared_memory import SharedMemory
from services.inference.scheduling.batcher import Batcher
from services.runtime.errors import InvalidArgumentError
from services.runtime.oip.tensors import DATATYPES
from tests import models
from tests.unit.inference.loaded import load as load_model


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads what a function of tests.models saves, once."""
    loaded = {}

    def load(make, *arguments):
        if (make, arguments) not in loaded:
            folder = make(tmp_path_factory.mktemp("repository"), *arguments)
            loaded[make, arguments] = load_model(folder)
        return loaded[make, arguments]

    return load


@pytest.fixture
def mlp(load):
    return load(models.mlp)


@pytest.fixture
def add_sub(load):
    return load(models.add_sub)


def request(*inputs, outputs=()):
    """Each input is a name, a datatype, a shape and raw bytes; by default as many zeros as the shape takes."""
    made = v2.ModelInferRequest(id="7")
    for name, datatype, shape, *raw in inputs:
        made.inputs.add(name=name, datatype=datatype, shape=shape)
        made.raw_input_contents.append(raw[0] if raw else bytes(math.prod(shape) * DATATYPES[datatype].itemsize))
    for name in outputs:
        made.outputs.add(name=name)
    return made


def typed(datatype, shape, **contents):
    made = v2.ModelInferRequest()
    made.inputs.add(name="x", datatype=datatype, shape=shape, contents=v2.InferTensorContents(**contents))
    return made


def decode_request(made, model):
    """Without any shared memory, which has tests of its own."""
    return decode_request_with(made, model, SharedMemory())


def answer(model, made):
    decoded = decode_request(made, model)
    return v2.ModelInferResponse.FromString(encode_response(model, decoded, model.run(decoded.arrays, decoded.outputs)))


def refused(made, model):
    with pytest.raises(InvalidArgumentError) as caught:
        decode_request(made, model)
    return caught.value.field, caught.value.message


X = ("x", "FP32", [1, 64])
A, B = ("a", "FP32", [1, 2]), ("b", "FP32", [1, 2])
TWO_ROWS = ("a", "FP32", [2, 2])


@pytest.mark.parametrize(
    ("inputs", "field", "words"),
    [
        ([("z", "FP32", [1, 2])], "inputs[0].name", ["'z'", "'a', 'b'"]),
        ([A], "inputs", ["'b'"]),
        ([A, A], "inputs[1].name", ["'a'", "twice"]),
        ([A, ("b", "INT32", [1, 2])], "inputs[1].datatype", ["'b'", "FP32", "INT32"]),
        ([("a", "FLOAT", [1, 2], bytes(8))], "inputs[0].datatype", ["no 'FLOAT'"]),
        ([("a", "FP32", [2])], "inputs[0].shape", ["[2]", "[-1, 2]"]),
        ([("a", "FP32", [1, 3])], "inputs[0].shape", ["[1, 3]", "[-1, 2]"]),
        ([("a", "FP32", [-1, 2], b"")], "inputs[0].shape", ["[-1, 2]"]),
        ([A, ("b", "FP32", [1, 2], bytes(7))], "inputs[1]", ["'b'", "7 bytes", "takes 8"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_input_is_named_with_what_it_should_be(add_sub, inputs, field, words):
    found, message = refused(request(*inputs), add_sub)
    assert found == field
    assert all(word in message for word in words), message


@pytest.mark.parametrize("datatype", ["fp32", "bytes"])
@pytest.mark.parametrize("shape", [[1 << 32, 1 << 32], [0, 1 << 62], [1 << 62, 0], [1 << 62, 1]], ids=str)
def test_dimensions_beyond_all_memory_are_refused_even_with_a_zero_among_them(load, datatype, shape):
    field, message = refused(request(("x", datatype.upper(), shape, b"")), load(models.identity, datatype))
    assert field == "inputs[0].shape"
    assert str(shape) in message


def test_every_input_needs_its_entry_in_the_raw_contents(add_sub):
    made = request(A, B)
    del made.raw_input_contents[1]
    field, message = refused(made, add_sub)
    assert field == "raw_input_contents"
    assert all(words in message for words in ("1 entries", "2 inputs"))


def test_raw_and_typed_contents_together_are_refused(mlp):
    made = request(X)
    made.inputs[0].contents.fp32_contents.extend([0] * 64)
    assert refused(made, mlp)[0] == "inputs[0].contents"


def test_empty_contents_beside_raw_ones_are_as_none(mlp):
    made = request(X)
    made.inputs[0].contents.SetInParent()
    assert decode_request(made, mlp).arrays["x"].shape == (1, 64)


def test_an_input_without_any_data_is_refused(mlp):
    made = v2.ModelInferRequest()
    made.inputs.add(name="x", datatype="FP32", shape=[1, 64])
    assert "no data" in refused(made, mlp)[1]


def test_typed_contents_mean_what_the_raw_bytes_mean(mlp):
    values = np.linspace(-1, 1, 64, dtype=np.float32)
    raw = decode_request(request(("x", "FP32", [1, 64], values.tobytes())), mlp)
    contents = decode_request(typed("FP32", [1, 64], fp32_contents=values), mlp)
    np.testing.assert_array_equal(raw.arrays["x"], contents.arrays["x"])
    assert raw.signature == contents.signature


@pytest.mark.parametrize(
    ("contents", "field", "words"),
    [
        ({"fp32_contents": [0] * 63}, "inputs[0].contents.fp32_contents", ["63 elements", "64"]),
        ({"int_contents": [0] * 64}, "inputs[0].contents", ["contents.fp32_contents", "int_contents is set"]),
        ({"fp32_contents": [0] * 64, "int_contents": [0]}, "inputs[0].contents", ["int_contents"]),
    ],
    ids=["count", "field", "two fields"],
)
def test_wrong_typed_contents_are_named_with_what_they_should_be(mlp, contents, field, words):
    found, message = refused(typed("FP32", [1, 64], **contents), mlp)
    assert found == field
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_half_precision_is_refused_as_typed_contents(load, name):
    message = refused(typed(name.upper(), [1, 1], fp32_contents=[1]), load(models.identity, name))[1]
    assert "raw_input_contents" in message


def test_priority_and_timeout_are_whole_numbers(mlp):
    asked = request(("x", "FP32", [1, 64]))
    asked.parameters["priority"].uint64_param = 2
    asked.parameters["timeout"].int64_param = 1500
    decoded = decode_request(asked, mlp)
    assert (decoded.priority, decoded.timeout_us) == (2, 1500)
    for name in ("priority", "timeout"):
        for wrong in (v2.InferParameter(string_param="1"), v2.InferParameter(int64_param=-1)):
            asked = request(("x", "FP32", [1, 64]))
            asked.parameters[name].CopyFrom(wrong)
            with pytest.raises(InvalidArgumentError, match=f"{name} must be a whole number"):
                decode_request(asked, mlp)


@pytest.mark.parametrize("name", ["sequence_start", "sequence_end"])
def test_the_ends_of_a_sequence_are_true_or_false_and_nothing_else(name, mlp):
    asked = request(("x", "FP32", [1, 64]))
    asked.parameters["sequence_id"].int64_param = 7
    for wrong in (v2.InferParameter(string_param="true"), v2.InferParameter(int64_param=1)):
        asked.parameters[name].CopyFrom(wrong)
        with pytest.raises(InvalidArgumentError, match=f"{name} must be true or false, in bool_param") as caught:
            decode_request(asked, mlp)
        assert caught.value.field == f"parameters.{name}"


def test_outputs_stand_in_the_models_order_whatever_order_was_asked(add_sub):
    forward, backward, default = (
        decode_request(request(A, B, outputs=names), add_sub)
        for names in (("sum", "difference"), ("difference", "sum"), ())
    )
    assert forward.outputs == backward.outputs == default.outputs == ("sum", "difference")
    assert forward.signature == backward.signature == default.signature


@pytest.mark.parametrize(
    ("outputs", "words"), [(["product"], ["'product'", "'sum', 'difference'"]), (["sum", "sum"], ["'sum'", "twice"])]
)
def test_a_wrong_output_is_named(add_sub, outputs, words):
    field, message = refused(request(A, B, outputs=outputs), add_sub)
    assert field == f"outputs[{len(outputs) - 1}].name"
    assert all(word in message for word in words), message


def test_requests_of_other_shapes_or_outputs_have_other_signatures(load, add_sub):
    identity = load(models.identity, "fp32")
    narrow, wide, tall = (decode_request(request(("x", "FP32", shape)), identity) for shape in ([1, 1], [1, 2], [3, 1]))
    assert narrow.signature != wide.signature
    assert narrow.signature == tall.signature
    assert (narrow.rows, tall.rows) == (1, 3)
    both, one = (decode_request(request(A, B, outputs=names), add_sub).signature for names in ((), ("sum",)))
    assert both != one


def test_inputs_with_unlike_rows_are_refused_where_the_configuration_says_that_rows_are_a_batch(load):
    def configured(repository):
        folder = models.add_sub(repository)
        (folder.parent / "config.pbtxt").write_text("max_batch_size: 4 dynamic_batching {}")
        return folder

    field, message = refused(request(TWO_ROWS, B), load(configured))
    assert field == "inputs"
    assert "'a': 2, 'b': 1" in message


def test_elsewhere_such_a_request_runs_alone_and_is_answered_as_the_graph_says(add_sub):
    made = request(TWO_ROWS, ("b", "FP32", [1, 2], np.array([1, 2], np.float32).tobytes()))
    first, second = (decode_request(made, add_sub) for _ in range(2))
    assert first.rows == 2
    assert first.signature != second.signature
    response = answer(add_sub, made)
    assert response.outputs[0].shape == [2, 2]
    assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [1, 2, 1, 2]


def test_requests_without_rows_share_no_batch(load):
    """Alone, ONNX Runtime may refuse one, such as a Reshape to [0, -1]; it must not depend on who asks meanwhile."""
    identity = load(models.identity, "fp32")
    first, second, other = (decode_request(request(("x", "FP32", [rows, 2])), identity) for rows in (0, 0, 1))
    assert len({first.signature, second.signature, other.signature}) == 3


def test_requests_that_give_an_optional_input_share_no_batch(load):
    def scaled(repository):
        folder = models.scaled(repository)
        (folder.parent / "config.pbtxt").write_text('input { name: "scale" optional: true }')
        return folder

    model = load(scaled)
    without = [decode_request(request(("x", "FP32", [3, 2])), model) for _ in range(2)]
    given = [decode_request(request(("scale", "FP32", [1]), ("x", "FP32", [3, 2])), model) for _ in range(2)]
    assert [decoded.rows for decoded in (*without, *given)] == [3, 3, 3, 3]
    assert len({decoded.signature for decoded in without}) == 1
    assert len({decoded.signature for decoded in (*without, *given)}) == 3


def test_an_answer_has_raw_contents_and_version_but_no_id(add_sub):
    a, b = (np.array([values], np.float32).tobytes() for values in ([3, 4], [1, 1]))
    response = answer(add_sub, request((*A, a), (*B, b)))
    assert (response.id, response.model_name, response.model_version) == ("", "add_sub", "1")
    assert [(o.name, o.datatype, list(o.shape)) for o in response.outputs] == [
        ("sum", "FP32", [1, 2]),
        ("difference", "FP32", [1, 2]),
    ]
    assert [np.frombuffer(raw, np.float32).tolist() for raw in response.raw_output_contents] == [[4, 5], [2, 3]]


@pytest.mark.parametrize("name", models.IDENTITIES)
def test_a_tensor_of_every_datatype_comes_back_as_the_bytes_it_was_sent_as(load, name):
    raw = b"\1\0\0\0a\4\0\0\0\0\xc3\xbc\0" if name == "bytes" else bytes([1, 0] * DATATYPES[name.upper()].itemsize)
    response = answer(load(models.identity, name), request(("x", name.upper(), [1, 2], raw)))
    assert (response.outputs[0].datatype, list(response.raw_output_contents)) == (name.upper(), [raw])


@pytest.mark.parametrize("name", ["fp32", "bytes"])
def test_no_rows_are_answered_with_no_rows(load, name):
    response = answer(load(models.identity, name), request(("x", name.upper(), [0, 3], b"")))
    assert (list(response.outputs[0].shape), list(response.raw_output_contents)) == ([0, 3], [b""])


def top(model, name, rows, count):
    """The classes that an identity model of datatype `name` answers for `rows`, with the output's shape."""
    kind = DATATYPES[name.upper()]
    array = np.array(rows, kind.dtype)
    made = request(("x", kind.name, array.shape, array.tobytes()), outputs=["y"])
    made.outputs[0].parameters["classification"].int64_param = count
    response = answer(model, made)
    assert response.outputs[0].datatype == "BYTES"
    raw, found = response.raw_output_contents[0], []
    while raw:
        size = int.from_bytes(raw[:4], "little")
        found.append(raw[4 : 4 + size].decode())
        raw = raw[4 + size :]
    return list(response.outputs[0].shape), found


@pytest.mark.parametrize(
    ("name", "classes"),
    [(name, ["7.000000:1", "3.000000:0"]) for name in ("fp16", "bf16", "fp32", "fp64")]
    + [(name, ["7:1", "3:0"]) for name in ("int8", "uint8", "int32", "uint64")],
)
def test_classes_are_written_as_triton_writes_them(load, name, classes):
    assert top(load(models.identity, name), name, [[3, 7, 1]], 2) == ([1, 2], classes)


def test_each_row_has_its_own_classes_and_no_more_than_there_are(load):
    shape, classes = top(load(models.identity, "int32"), "int32", [[-5, 2], [9, -1]], 5)
    assert shape == [2, 2]
    assert classes == ["2:1", "-5:0", "9:0", "-1:1"]


def test_integers_too_large_for_a_float_are_ranked_exactly(load):
    _, classes = top(load(models.identity, "uint64"), "uint64", [[2**53, 2**53 + 1, 2**64 - 1]], 3)
    assert classes == [f"{2**64 - 1}:2", f"{2**53 + 1}:1", f"{2**53}:0"]


def test_classes_have_their_labels_as_triton_writes_them(tmp_path):
    folder = models.identity(tmp_path, "fp32")
    (folder.parent / "labels.txt").write_bytes(b"\xef\xbb\xbfcat\r\n\nd:o g\n")
    (folder.parent / "config.pbtxt").write_text('output { name: "y" label_filename: "labels.txt" }')
    model = load_model(folder)
    classes = ["4.000000:3", "3.000000:2:d:o g", "2.000000:1", "1.000000:0:cat"]
    assert top(model, "fp32", [[1, 2, 3, 4]], 4) == ([1, 4], classes)


def test_more_classes_than_an_answer_may_have_strings_are_refused(load):
    with pytest.raises(InvalidArgumentError, match="131072 at most"):
        top(load(models.identity, "int8"), "int8", np.zeros((2, 1 << 17)), 1 << 17)


def test_no_rows_have_no_classes(load):
    assert top(load(models.identity, "fp32"), "fp32", np.zeros((0, 3)), 2) == ([0, 2], [])


@pytest.mark.parametrize(("name", "count"), [("bool", 1), ("bytes", 1), ("fp32", 0), ("fp32", -1)])
def test_classes_are_refused_where_there_is_nothing_to_rank(load, name, count):
    raw = bytes(4) if name == "bytes" else None
    made = request(("x", name.upper(), [1, 1], *([raw] if raw else [])), outputs=["y"])
    made.outputs[0].parameters["classification"].int64_param = count
    assert refused(made, load(models.identity, name))[0] == "outputs[0].parameters.classification"


@pytest.mark.parametrize("name", ["mlp", "bytes"])
async def test_a_real_model_answers_in_a_batch_what_it_answers_alone(load, name):
    model = load(models.mlp) if name == "mlp" else load(models.identity, name)
    rng = np.random.default_rng(0)

    def make(rows):
        if name == "bytes":
            return request(("x", "BYTES", [rows, 1], b"".join(b"\1\0\0\0%d" % rng.integers(10) for _ in range(rows))))
        return request(("x", "FP32", [rows, 64], rng.random((rows, 64), np.float32).tobytes()))

    decoded = [decode_request(make(1 + index % 3), model) for index in range(20)]
    with ThreadPoolExecutor(1) as executor:
        batcher = Batcher(model, executor)
        # All are queued before the loop first turns, so that what the first does not take is batched.
        batches = await asyncio.gather(*(batcher.submit(one, None) for one in decoded))
        await batcher.close()
    assert max(batch.batch_requests for batch in batches) > 1
    for one, batch in zip(decoded, batches, strict=True):
        (alone,) = model.run(one.arrays, one.outputs)
        if name == "bytes":
            assert batch.arrays[0].tolist() == alone.tolist()
        else:
            np.testing.assert_allclose(batch.arrays[0], alone, rtol=1e-5, atol=1e-5)
