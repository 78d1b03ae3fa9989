"""Tensors in shared memory objects whose owners do with them as they like."""

import errno
import os
import uuid
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.codec.request import decode_request, encode_response
from services.inference.codec.shared_memory import MAX_REGIONS, MAX_REQUEST_BYTES, SharedMemory
from services.runtime.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError
from tests.unit.inference.codec.test_request import add_sub, load  # noqa: F401 - fixtures

SIZE = 4096


@pytest.fixture
def file():
    """A new shared memory object of SIZE bytes."""
    path = Path("/dev/shm") / f"ringmesh_test_{uuid.uuid4().hex}"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def memory(file):
    memory = SharedMemory()
    memory.register("region", f"/{file.name}", 0, SIZE)
    return memory


def place(tensor, offset, size, region="region"):
    tensor.parameters["shared_memory_region"].string_param = region
    tensor.parameters["shared_memory_offset"].int64_param = offset
    tensor.parameters["shared_memory_byte_size"].int64_param = size


def request(*, output_at=None):
    """[1, 2] of FP32 for a at byte 0 and for b at byte 8 of the region."""
    made = v2.ModelInferRequest()
    for index, name in enumerate("ab"):
        place(made.inputs.add(name=name, datatype="FP32", shape=[1, 2]), 8 * index, 8)
    if output_at is not None:
        place(made.outputs.add(name="sum"), output_at, 8)
    return made


def descriptors(file):
    return sum(os.path.realpath(path) == str(file) for path in Path("/proc/self/fd").iterdir())


@pytest.fixture(name="model")
def _model(add_sub):  # noqa: F811
    return add_sub


def test_an_input_whose_object_was_truncated_is_refused_with_region_offset_and_size(model, memory, file):
    os.truncate(file, 12)
    with pytest.raises(
        InvalidArgumentError, match=r"bytes 8 to 16 of .*'region' are no longer there.* 12 bytes"
    ) as error:
        decode_request(request(), model, memory)
    assert error.value.field == "inputs[1].parameters"


def test_an_input_that_was_read_stays_what_it_was_whatever_becomes_of_the_object(model, memory, file):
    decoded = decode_request(request(), model, memory)
    before = decoded.arrays["a"].copy()
    os.truncate(file, 0)
    np.testing.assert_array_equal(decoded.arrays["a"], before)
    file.write_bytes(bytes(SIZE))
    np.testing.assert_array_equal(decoded.arrays["a"], before)


def test_an_output_whose_object_was_truncated_is_refused_and_does_not_make_it_larger_again(model, memory, file):
    decoded = decode_request(request(output_at=1024), model, memory)
    os.truncate(file, 1000)
    outputs = model.run(decoded.arrays, decoded.outputs)
    with pytest.raises(InvalidArgumentError, match=r"bytes 1024 to 1032 .* no longer there"):
        encode_response(model, decoded, outputs)
    assert file.stat().st_size == 1000


def test_a_request_under_way_keeps_its_regions_when_they_are_unregistered(model, memory, file):
    decoded = decode_request(request(output_at=1024), model, memory)
    memory.unregister("region")
    encode_response(model, decoded, [np.array([[1, 2]], np.float32)])
    assert np.frombuffer(file.read_bytes()[1024:1032], np.float32).tolist() == [1, 2]


def test_descriptors_are_closed_when_regions_are_unregistered_refused_or_registered_again(memory, file):
    key = f"/{file.name}"
    memory.unregister("")
    before = descriptors(file)
    for _ in range(20):
        memory.register("again", key, 0, 16)
        with pytest.raises(InvalidArgumentError):
            memory.register("larger", key, 0, SIZE + 1)
        memory.unregister("again")
    assert descriptors(file) == before


@pytest.mark.parametrize("key", ["", "/", "/.", "/..", "//etc", "/a/b", "/a\0b", "/" + "x" * 300])
def test_a_key_that_is_no_shared_memory_object_is_refused(key):
    with pytest.raises(InvalidArgumentError, match="no key of a POSIX shared memory object"):
        SharedMemory().register("region", key, 0, 16)


def test_an_object_that_cannot_be_opened_is_not_found():
    with pytest.raises(NotFoundError, match="cannot open the shared memory object"):
        SharedMemory().register("region", "/nowhere-at-all", 0, 16)


def test_a_worker_out_of_descriptors_does_not_say_that_there_is_no_such_object(file, monkeypatch):
    monkeypatch.setattr(os, "open", Mock(side_effect=OSError(errno.EMFILE, "")))
    with pytest.raises(ResourceExhaustedError, match="Too many open files"):
        SharedMemory().register("region", file.name, 0, 16)


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (0, -1), (-1, 16), (0, SIZE + 1), (SIZE, 1), (2**63, 2**63)])
def test_a_region_lies_within_its_object(file, offset, size):
    with pytest.raises(InvalidArgumentError):
        SharedMemory().register("region", file.name, offset, size)


def test_a_link_and_a_pipe_are_no_shared_memory_objects(file):
    link, pipe = file.with_name(f"{file.name}_link"), file.with_name(f"{file.name}_pipe")
    link.symlink_to(file)
    os.mkfifo(pipe)
    try:
        with pytest.raises(NotFoundError):
            SharedMemory().register("region", link.name, 0, 16)
        with pytest.raises(InvalidArgumentError, match="is not a POSIX shared memory object"):
            SharedMemory().register("region", pipe.name, 0, 16)
    finally:
        link.unlink()
        pipe.unlink()


def test_a_region_begins_with_the_prefix_of_the_worker(file):
    with pytest.raises(InvalidArgumentError, match="should begin with '/ours_'"):
        SharedMemory("ours_").register("region", file.name, 0, 16)
    SharedMemory("ringmesh_test_").register("region", f"/{file.name}", 0, 16)


def test_an_object_of_another_user_and_a_semaphore_are_refused(file, monkeypatch):
    with pytest.raises(InvalidArgumentError, match="no key"):
        SharedMemory().register("region", "sem.of_others", 0, 16)
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
    with pytest.raises(InvalidArgumentError, match=f"belongs to user {file.stat().st_uid}"):
        SharedMemory().register("region", file.name, 0, 16)


def test_regions_and_their_names_are_bounded(memory, file):
    for name in ("", "x" * 256):
        with pytest.raises(InvalidArgumentError, match="name of up to 255"):
            memory.register(name, file.name, 0, 16)
    for number in range(MAX_REGIONS - 1):
        memory.register(str(number), file.name, 0, 16)
    with pytest.raises(ResourceExhaustedError, match="unregister"):
        memory.register("one more", file.name, 0, 16)


@pytest.mark.parametrize(("offset", "size"), [(-8, 8), (0, -8), (SIZE - 4, 8), (2**62, 8)])
def test_a_part_beyond_its_region_is_refused(memory, offset, size):
    with pytest.raises(InvalidArgumentError, match="are not in shared memory region"):
        memory.find("region", "field").read(offset, size, "field")


def test_sizes_and_offsets_are_whole_numbers(model, memory):
    made = request()
    made.inputs[0].parameters["shared_memory_offset"].string_param = "8"
    with pytest.raises(InvalidArgumentError, match="shared_memory_offset must be a whole number"):
        decode_request(made, model, memory)
    made.inputs[0].parameters["shared_memory_offset"].uint64_param = 8
    assert (decode_request(made, model, memory).arrays["a"] == decode_request(made, model, memory).arrays["b"]).all()


def test_a_large_part_is_read_and_written_whole(file):
    data = np.random.default_rng(1).integers(0, 256, 40 << 20, np.uint8)
    file.write_bytes(bytes(data.nbytes + 8))
    memory = SharedMemory()
    memory.register("large", file.name, 8, data.nbytes)
    region = memory.find("large", "field")
    region.write(0, data.tobytes(), "field")
    np.testing.assert_array_equal(region.read(0, data.nbytes, "field"), data)


def test_a_request_takes_no_more_from_shared_memory_than_the_limit(model, file):
    os.truncate(file, MAX_REQUEST_BYTES)  # sparse
    memory = SharedMemory()
    memory.register("region", f"/{file.name}", 0, MAX_REQUEST_BYTES)
    made = v2.ModelInferRequest()
    rows = MAX_REQUEST_BYTES // 16 + 1
    for name in "ab":
        place(made.inputs.add(name=name, datatype="FP32", shape=[rows, 2]), 0, 8 * rows)
    with pytest.raises(ResourceExhaustedError, match=f"at most {MAX_REQUEST_BYTES}"):
        decode_request(made, model, memory)
