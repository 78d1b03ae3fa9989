"""Memory that nobody uses goes back to the system, and what is in use again and again stays."""

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from services.inference.execution.loading import load_model
from services.inference.repository.repository import versions
from services.runtime.machine import memory
from services.runtime.machine.memory import KEPT_BYTES
from tests import models


class Malloc:
    """Holds `free` bytes; at each look `used`, in turn, are in use."""

    def __init__(self, free, used=(0,)):
        self.free = free
        self.used = used
        self.looks = 0

    def free_bytes(self):
        self.looks += 1
        return max(0, self.free - self.used[self.looks % len(self.used)])

    def give_back(self, size):
        self.free -= min(self.free, size)


@pytest.fixture
def rounds(monkeypatch):
    """Runs so many rounds on a malloc."""
    monkeypatch.setattr(memory, "ROUND_SECONDS", 0.001)
    monkeypatch.setattr(memory, "_PAUSE_SECONDS", 0)

    async def run(held, count=2):
        ended = asyncio.Event()
        left = count

        def shrink():
            nonlocal left
            left -= 1
            if left < 0:
                loop.call_soon_threadsafe(ended.set)

        loop = asyncio.get_running_loop()
        task = asyncio.create_task(memory.keep_giving_back(shrink, held))
        await asyncio.wait_for(ended.wait(), 20)
        task.cancel()

    return run


async def test_what_nobody_used_for_a_round_is_given_back_but_for_what_is_kept(rounds):
    held = Malloc(5 * KEPT_BYTES)
    await rounds(held)
    assert held.free == KEPT_BYTES


async def test_what_is_used_now_and_then_stays(rounds):
    held = Malloc(5 * KEPT_BYTES, used=(0, 0, 0, 4 * KEPT_BYTES))
    await rounds(held)
    assert held.free == 5 * KEPT_BYTES


async def test_little_stays(rounds):
    held = Malloc(KEPT_BYTES)
    await rounds(held)
    assert held.free == KEPT_BYTES


def test_this_process_can_be_asked_what_its_malloc_holds():
    held = memory.malloc()
    if held is None:
        pytest.skip("another system")
    assert held.free_bytes() >= 0
    held.give_back(1 << 20)


def _left_by_large_runs(folder):
    """Runs a model with outputs of 256 and 128 MiB; returns by how many bytes the process had grown after each."""
    (files,) = versions(folder, "wide")
    model = load_model(files, providers=["CPUExecutionProvider"], intra_op_threads=1, max_batch_rows=1)
    process = psutil.Process()
    before = process.memory_info().rss
    left = []
    for megabytes in (256, 128):
        (array,) = model.run({"x": np.ones(megabytes // 4, np.float32)}, ["y"])
        model.shrink()  # in use: it stays
        assert array.all()
        del array
        model.shrink()
        left.append(process.memory_info().rss - before)
    return left


def test_a_large_run_leaves_nothing_behind_once_its_outputs_are_gone(tmp_path):
    nodes = [helper.make_node("Unsqueeze", ["x", "one"], ["u"]), helper.make_node("Expand", ["u", "sizes"], ["y"])]
    constants = {"one": np.array([1]), "sizes": np.array([1, 1 << 20])}
    x, y = models.value("x", TensorProto.FLOAT, "n"), models.value("y", TensorProto.FLOAT, "n", 1 << 20)
    models.save(tmp_path, "wide", nodes, [x], [y], [numpy_helper.from_array(v, k) for k, v in constants.items()])
    (tmp_path / "wide" / "config.pbtxt").write_text("max_batch_size: 0")
    # In a process of its own: other tests of this one leave some MiB at any time.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert max(pool.submit(_left_by_large_runs, tmp_path).result(300)) < 32 << 20
