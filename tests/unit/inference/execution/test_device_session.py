"""On the CPU, which stands in for the device: the same binding, buffers and tensors, and no GPU needed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from services.inference.execution.device_session import MAX_GRAPHS, DeviceSession, page_locked
from tests import models

DTYPES = {"x": np.dtype(np.float32), "y": np.dtype(np.float32)}


@pytest.fixture
def session(tmp_path):
    return onnxruntime.InferenceSession(models.mlp(tmp_path) / "model.onnx", providers=["CPUExecutionProvider"])


def rows(count, seed=0):
    return np.random.default_rng(seed).random((count, 64), dtype=np.float32)


def on_device(session, *, cuda_graphs=False, allocate=None, shape=lambda _, feeds: (len(feeds["x"]), 10)):
    return DeviceSession(session, 0, DTYPES, shape, {}, cuda_graphs=cuda_graphs, allocate=allocate, device_type="cpu")


class Memory:
    """Ordinary memory in place of the page-locked kind; counts what is taken."""

    def __init__(self):
        self.taken = 0

    def __call__(self, shape, dtype):
        self.taken += 1
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype)


@pytest.mark.parametrize(
    "options", [{}, {"allocate": Memory()}, {"cuda_graphs": True}], ids=["plain", "allocated", "cuda graphs"]
)
def test_the_answers_are_those_of_a_plain_run(session, options):
    device = on_device(session, **options)
    for count in (1, 3, 1, 3):
        x = rows(count, seed=count)
        (answer,) = device.run(["y"], {"x": x})
        assert answer.tobytes() == session.run(["y"], {"x": x})[0].tobytes()


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_scalar_comes_out_as_one(tmp_path, cuda_graphs):
    x, y = models.value("x", TensorProto.FLOAT), models.value("y", TensorProto.FLOAT)
    folder = models.save(tmp_path, "m", [helper.make_node("Identity", ["x"], ["y"])], [x], [y])
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    device = on_device(session, cuda_graphs=cuda_graphs, shape=lambda *_: ())
    (answer,) = device.run(["y"], {"x": np.array(7, np.float32)})
    assert (answer.shape, answer) == ((), 7)


def test_a_buffer_serves_the_next_run_of_its_shape_and_no_answer_changes_afterwards(session):
    memory = Memory()
    device = on_device(session, allocate=memory)
    inputs = [rows(2, seed) for seed in range(5)]
    answers = [device.run(["y"], {"x": x})[0] for x in inputs]
    assert memory.taken == 1
    for x, answer in zip(inputs, answers, strict=True):
        assert answer.tobytes() == session.run(["y"], {"x": x})[0].tobytes()


def test_a_buffer_comes_back_from_a_run_that_fails(session):
    memory = Memory()
    device = on_device(session, allocate=memory)
    for _ in range(3):
        with pytest.raises(Exception, match="64"):
            device.run(["y"], {"x": np.zeros((2, 63), np.float32)})
    device.run(["y"], {"x": rows(2)})
    assert memory.taken == 1


def test_an_output_whose_shape_only_the_run_can_tell_has_no_buffer(tmp_path):
    x, y = models.value("x", models.TensorProto.FLOAT, "n", 64), models.value("y", models.TensorProto.INT64, 2, "k")
    folder = models.save(tmp_path, "nonzero", [helper.make_node("NonZero", ["x"], ["y"])], [x], [y])
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    memory = Memory()
    device = on_device(session, allocate=memory, cuda_graphs=True, shape=lambda *_: None)
    (answer,) = device.run(["y"], {"x": np.eye(2, 64, dtype=np.float32)})
    assert answer.tolist() == [[0, 1], [0, 1]]
    assert memory.taken == 0


def test_more_shapes_than_graphs_are_kept_for_are_answered_all_the_same(session):
    device = on_device(session, cuda_graphs=True)
    for count in range(1, MAX_GRAPHS + 5):
        assert len(device.run(["y"], {"x": rows(count)})[0]) == count


@pytest.mark.parametrize("options", [{"allocate": Memory()}, {"cuda_graphs": True}], ids=["allocated", "cuda graphs"])
def test_threads_that_run_side_by_side_each_get_their_own_answer(session, options):
    device = on_device(session, **options)
    inputs = [rows(1 + seed % 3, seed) for seed in range(64)]
    begin = threading.Barrier(4)

    def some(part):
        begin.wait()
        return [device.run(["y"], {"x": x})[0] for x in part]

    with ThreadPoolExecutor(4) as pool:
        answers = [answer for part in pool.map(some, (inputs[start::4] for start in range(4))) for answer in part]
    expected = [session.run(["y"], {"x": x})[0] for start in range(4) for x in inputs[start::4]]
    assert [answer.tobytes() for answer in answers] == [answer.tobytes() for answer in expected]


def test_a_machine_without_page_locked_memory_says_so():
    assert page_locked("CPUExecutionProvider", 0) is None
    assert page_locked("CUDAExecutionProvider", 0) is None
