import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.errors import InvalidArgumentError
from services.runtime.oip.tensors import DATATYPES, decode, encode, raw_from_contents

NUMERIC = [kind for kind in DATATYPES.values() if kind.itemsize]
SHAPES = numpy_strategies.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)


@given(st.sampled_from(NUMERIC), SHAPES, st.data())
def test_raw_bytes_decoded_and_encoded_are_the_same_bytes(kind, shape, data):
    size = int(np.prod(shape)) * kind.itemsize
    raw = data.draw(st.binary(min_size=size, max_size=size))
    array = decode(kind, shape, raw, "x")
    assert (array.dtype, array.shape) == (kind.dtype, shape)
    assert encode(array) == raw


@given(st.lists(st.binary(max_size=10), max_size=6))
def test_bytes_elements_decoded_and_encoded_are_the_same(values):
    raw = b"".join(len(value).to_bytes(4, "little") + value for value in values)
    array = decode(DATATYPES["BYTES"], (len(values),), raw, "x")
    assert array.tolist() == values
    assert encode(array) == raw


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", ["0 bytes", "8"]),
        (b"\x05\0\0\0abc\0", ["element 0", "5 bytes", "4 are left"]),
        (b"\0\0\0\0\xff\xff\xff\xff", ["element 1", "4294967295"]),
        (b"\x01\0\0\0a\0\0\0", ["element 1", "0 are left"]),
        (b"\0\0\0\0\0\0\0\0x", ["1 bytes are left"]),
    ],
)
def test_bytes_elements_that_do_not_fit_are_named(raw, words):
    with pytest.raises(InvalidArgumentError) as caught:
        decode(DATATYPES["BYTES"], (2,), raw, "x")
    assert all(word in caught.value.message for word in words), caught.value.message


def test_a_wrong_number_of_bytes_says_what_the_shape_takes():
    with pytest.raises(InvalidArgumentError, match=r"'x': 252 bytes for FP32 \[1, 64\], which takes 256"):
        decode(DATATYPES["FP32"], (1, 64), bytes(252), "x")


def tensor(datatype, **contents):
    return v2.ModelInferRequest.InferInputTensor(
        name="x", datatype=datatype, contents=v2.InferTensorContents(**contents)
    )


@pytest.mark.parametrize(
    ("datatype", "contents", "raw"),
    [
        ("BOOL", {"bool_contents": [True, False]}, b"\1\0"),
        ("INT8", {"int_contents": [-1, 127]}, b"\xff\x7f"),
        ("INT8", {"int_contents": [300]}, b"\x2c"),
        ("UINT16", {"uint_contents": [65535]}, b"\xff\xff"),
        ("INT64", {"int64_contents": [-2]}, b"\xfe" + b"\xff" * 7),
        ("FP32", {"fp32_contents": [1.0]}, b"\0\0\x80\x3f"),
        ("BYTES", {"bytes_contents": [b"ab", b""]}, b"\2\0\0\0ab\0\0\0\0"),
    ],
)
def test_typed_contents_have_the_raw_bytes_of_their_datatype(datatype, contents, raw):
    assert raw_from_contents(tensor(datatype, **contents)) == raw


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_travels_only_raw(datatype):
    with pytest.raises(InvalidArgumentError, match="raw_input_contents"):
        raw_from_contents(tensor(datatype, fp32_contents=[1.0]))


def test_contents_of_another_datatype_are_refused_by_name():
    with pytest.raises(InvalidArgumentError, match=r"contents.fp32_contents, but int_contents"):
        raw_from_contents(tensor("FP32", int_contents=[1]))


def test_a_datatype_that_does_not_exist_is_told_those_that_do():
    with pytest.raises(InvalidArgumentError, match=r"FLOAT.*FP32"):
        raw_from_contents(tensor("FLOAT"))
