"""The requests of an envelope: each has an answer or a failure of its own, and equal ones run once."""

import asyncio
import gc
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.codec.shared_memory import Region
from services.inference.envelope import Work
from services.inference.execution.loading import decide
from services.inference.execution.model import OnnxModel
from services.inference.models.model_store import ModelStore
from services.inference.repository.repository import Directory
from services.inference.worker import Worker
from services.runtime import driver
from services.runtime.driver import ON_LOOP
from services.runtime.large_bytes import LARGE_BYTES
from tests import models
from tests.unit.turns import turns


class Gated(OnnxModel):
    """Runs only while the gate is open, and counts its runs."""

    gate: threading.Event
    runs: list[int]

    def run(self, inputs, outputs):
        if hasattr(self, "gate"):
            assert self.gate.wait(10)
            self.runs.append(len(inputs["x"]))
        return super().run(inputs, outputs)


@pytest.fixture
async def worker(tmp_path):
    models.mlp(tmp_path)
    executor = ThreadPoolExecutor(2)

    def open_model(files):
        made = Gated(files, providers=["CPUExecutionProvider"], intra_op_threads=1)
        decide(made, max_batch_rows=64)
        return made

    store = ModelStore(Directory(tmp_path), open_model, executor)
    await store.load_all()
    worker = Worker("w", store)
    model = store.held.find("mlp", "").model
    model.gate, model.runs = threading.Event(), []
    model.gate.set()
    yield worker
    model.gate.set()
    await store.close()
    executor.shutdown()


def model_of(worker):
    return worker.store.held.find("mlp", "").model


def work(value, request_hash=b"", *, columns=64, deadline=None, trace_context=b""):
    x = np.full((1, columns), value, np.float32)
    request = v2.ModelInferRequest(model_name="mlp", raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    return Work(request.SerializeToString(), request_hash, deadline, trace_context)


async def execute(worker, works):
    return await driver.run(worker.execute(works))


def run_inline(worker, works):
    """The results of an inline run; None if the requests have to wait."""
    executing = worker.execute(works)
    try:
        assert executing.send(None) is ON_LOOP
    except StopIteration as ended:
        return ended.value
    executing.close()
    return None


def answer(worker, value):
    (array,) = OnnxModel.run(model_of(worker), {"x": np.full((1, 64), value, np.float32)}, ["y"])
    return array


def told(result):
    return np.frombuffer(v2.ModelInferResponse.FromString(result.response).raw_output_contents[0], np.float32)


async def test_an_envelope_is_one_batch(worker):
    model_of(worker).runs.clear()
    results = await execute(worker, [work(value) for value in range(20)])
    assert model_of(worker).runs == [20]
    for value, result in enumerate(results):
        np.testing.assert_allclose(told(result), answer(worker, value)[0], rtol=1e-5)
        assert (result.timing.batch_requests, result.model_digest) == (20, model_of(worker).digest)


async def test_a_wrong_request_fails_alone(worker):
    results = await execute(worker, [work(1), work(2, columns=63), Work(b"\xff", b"", None, b""), work(3)])
    assert [result.failure.code for result in results] == [0, 3, 3, 0]
    assert "[1, 63]" in results[1].failure.message
    assert results[1].model_digest == model_of(worker).digest  # for routers that cache refusals
    assert worker.load.requests == 0


async def test_a_clock_that_is_set_back_meanwhile_fails_no_request(worker, monkeypatch):
    model_of(worker).gate.clear()
    running = asyncio.create_task(execute(worker, [work(1), work(2)]))
    await turns()
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 3600 * 10**9)
    model_of(worker).gate.set()
    for result in await running:
        assert not result.HasField("failure")
        assert result.timing.queue_us + result.timing.compute_us <= result.timing.total_us
    statistics = worker.store.held.find("mlp", "").statistics.message()
    assert statistics.inference_stats.success.count == 2
    assert statistics.last_inference == (now - 3600 * 10**9) // 1_000_000


async def test_equal_requests_run_once_in_one_envelope_and_across_two(worker):
    model_of(worker).gate.clear()
    model_of(worker).runs.clear()
    envelopes = [asyncio.create_task(execute(worker, [work(1, b"h" * 16) for _ in range(2)])) for _ in range(2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    model_of(worker).gate.set()
    results = [result for results in await asyncio.gather(*envelopes) for result in results]
    assert model_of(worker).runs == [1]
    assert [result.timing.joined for result in results].count(False) == 1
    for result in results:
        np.testing.assert_allclose(told(result), answer(worker, 1)[0], rtol=1e-5)


@pytest.mark.parametrize("forged_first", [True, False], ids=["forged first", "forged second"])
async def test_a_request_under_the_hash_of_another_changes_nothing(worker, forged_first):
    """Anybody who can reach the port may state any hash."""
    model_of(worker).gate.clear()

    values = [2, 1] if forged_first else [1, 2]
    tasks = []
    for value in (*values, *values):
        tasks.append(asyncio.create_task(execute(worker, [work(value, b"h" * 16)])))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    model_of(worker).gate.set()
    results = await asyncio.gather(*tasks)
    for value, (result,) in zip((*values, *values), results, strict=True):
        np.testing.assert_allclose(told(result), answer(worker, value)[0], rtol=1e-5)
    assert not worker._leaders
    assert worker.load.requests == 0


async def test_equal_requests_with_other_ids_run_once(worker):
    model_of(worker).gate.clear()
    model_of(worker).runs.clear()
    one, other = work(1, b"h" * 16), work(1, b"h" * 16)
    one.data += b"\x1a\x01a"
    other.data = b"\x1a\x01b" + other.data
    envelope = asyncio.create_task(execute(worker, [one, other]))
    await asyncio.sleep(0)
    model_of(worker).gate.set()
    results = await envelope
    assert model_of(worker).runs == [1]
    assert [result.timing.joined for result in results] == [False, True]


async def test_what_is_kept_to_compare_with_goes_when_its_flight_ends(worker):
    await execute(worker, [work(value, b"%016d" % value) for value in range(20)])
    await execute(worker, [work(1, b"h" * 16)])
    await execute(worker, [work(1, b"w" * 16, columns=63)])
    await asyncio.sleep(0)
    assert not worker._leaders


async def test_an_envelope_whose_router_has_gone_leaves_to_others_what_they_joined_and_drops_the_rest(worker):
    model_of(worker).gate.clear()
    busy = asyncio.create_task(execute(worker, [work(0)]))
    await turns()  # it has the only instance
    model_of(worker).runs.clear()
    leaving = asyncio.create_task(execute(worker, [work(1, b"h" * 16), *(work(value) for value in range(2, 6))]))
    await asyncio.sleep(0)
    staying = asyncio.create_task(execute(worker, [work(1, b"h" * 16)]))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    model_of(worker).gate.set()
    (result,) = await staying
    np.testing.assert_allclose(told(result), answer(worker, 1)[0], rtol=1e-5)
    await busy
    assert model_of(worker).runs == [1, 1]  # the busy one and what was joined; the four others never ran
    assert worker.load.requests == 0


async def test_a_run_that_fails_after_its_router_has_gone_is_no_unhandled_fault(worker, caplog):
    model_of(worker).gate.clear()
    leaving = asyncio.create_task(execute(worker, [work(1)]))
    await turns()  # it runs
    leaving.cancel()
    await asyncio.wait([leaving])
    model_of(worker).runs = None  # so that the run fails
    model_of(worker).gate.set()
    while worker.store.held.find("mlp", "").batcher._batches:
        await asyncio.sleep(0)
    del leaving
    gc.collect()
    assert not caplog.records
    assert worker.load.requests == 0


async def test_what_is_withdrawn_before_it_runs_never_runs_and_leaves_its_envelope_be(worker):
    model_of(worker).gate.clear()
    model_of(worker).runs.clear()
    running = asyncio.create_task(execute(worker, [work(0, trace_context=b"running")]))
    await turns()  # it has the only instance
    works = [work(1, b"h" * 16, trace_context=b"lost"), work(2, trace_context=b"kept")]
    envelope = asyncio.create_task(execute(worker, works))
    await asyncio.sleep(0)
    assert worker.withdraw([b"lost", b"unknown", b"running"]) == 1
    assert worker.withdraw([b"lost"]) == 0
    model_of(worker).gate.set()
    lost, kept = await envelope
    assert (lost.failure.code, lost.failure.message) == (4, "nobody waits for it any more")
    np.testing.assert_allclose(told(kept), answer(worker, 2)[0], rtol=1e-5)
    assert [result.failure.code for result in await running] == [0]
    assert model_of(worker).runs == [1, 1]
    statistics = worker.store.held.find("mlp", "").statistics
    assert (statistics.withdrawn, statistics.message().inference_stats.success.count) == (1, 2)
    assert worker.load.requests == 0


async def test_who_joined_what_is_withdrawn_runs_it_for_himself(worker):
    model_of(worker).gate.clear()
    busy = asyncio.create_task(execute(worker, [work(0)]))
    await turns()
    model_of(worker).runs.clear()
    first = asyncio.create_task(execute(worker, [work(1, b"h" * 16, trace_context=b"lost")]))
    await asyncio.sleep(0)
    joined = asyncio.create_task(execute(worker, [work(1, b"h" * 16)]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert worker.withdraw([b"lost"]) == 1
    model_of(worker).gate.set()
    (result,) = await joined
    np.testing.assert_allclose(told(result), answer(worker, 1)[0], rtol=1e-5)
    assert [result.failure.code for result in await first] == [4]
    await busy
    assert model_of(worker).runs == [1, 1]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("services.inference.execution.inline_runs.QUICK_NS", 10**12)


async def test_what_is_quick_is_run_by_whoever_has_it_in_one_batch(worker, quick):
    await execute(worker, [work(0)])  # so that it is known
    model_of(worker).runs.clear()
    before = worker.load.answered
    results = await asyncio.to_thread(run_inline, worker, [work(value, b"h%d" % value) for value in range(20)])
    assert model_of(worker).runs == [20]
    for value, result in enumerate(results):
        np.testing.assert_allclose(told(result), answer(worker, value)[0], rtol=1e-5)
        assert (result.timing.batch_requests, result.model_digest) == (20, model_of(worker).digest)
    assert worker.load.answered == before + 20
    statistics = worker.store.held.find("mlp", "").statistics.message()
    assert (statistics.inference_count, statistics.execution_count) == (21, 2)
    assert statistics.inference_stats.success.count == statistics.inference_stats.compute_infer.count == 21


async def test_what_may_be_slow_is_not_run_at_once(worker, monkeypatch):
    assert run_inline(worker, [work(0)]) is None  # nothing is known of it
    monkeypatch.setattr("services.inference.execution.inline_runs.QUICK_NS", 0)
    await execute(worker, [work(0)])
    assert run_inline(worker, [work(0)]) is None


async def test_what_is_wrong_late_or_under_way_is_not_run_at_once(worker, quick, monkeypatch):
    await execute(worker, [work(0)])
    wrong, late = work(1, columns=63), work(1, deadline=time.monotonic() - 1)
    for others in ([wrong], [Work(b"\xff", b"", None, b"")], [late], []):
        assert run_inline(worker, [work(0), *others] if others else []) is None
    model_of(worker).gate.clear()
    with monkeypatch.context() as slow:
        slow.setattr("services.inference.execution.inline_runs.QUICK_NS", 0)
        running = asyncio.create_task(execute(worker, [work(1, b"same")]))
        await turns()
    assert run_inline(worker, [work(1, b"same")]) is None
    model_of(worker).gate.set()
    await running


async def test_what_fails_at_once_fails_alone_and_is_counted(worker, quick, monkeypatch):
    await execute(worker, [work(0)])
    monkeypatch.setattr("services.inference.work_results.MAX_RESPONSE_BYTES", 1)
    results = run_inline(worker, [work(1), work(2)])
    assert [result.failure.code for result in results] == [8, 8]
    assert worker.store.held.find("mlp", "").statistics.message().inference_stats.fail.count == 2


async def test_a_large_request_is_answered_as_others_are_and_joined_by_its_equal(worker):
    rows = 2 * LARGE_BYTES // (64 * 4)
    x = np.random.default_rng(0).random((rows, 64), np.float32)
    request = v2.ModelInferRequest(model_name="mlp", raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    large = Work(request.SerializeToString(), b"h" * 16, None, b"")
    model_of(worker).runs.clear()
    first, small, other = await execute(worker, [large, work(1), large])
    (expected,) = OnnxModel.run(model_of(worker), {"x": x}, ["y"])
    for result in (first, other):
        np.testing.assert_allclose(told(result), expected.ravel(), rtol=1e-5)
    assert [first.timing.joined, other.timing.joined].count(True) == 1
    np.testing.assert_allclose(told(small), answer(worker, 1)[0], rtol=1e-5)
    assert sorted(model_of(worker).runs) == [1, rows]
    assert worker.load.requests == 0


async def test_a_large_response_is_the_models_own(worker):
    rows = 2 * LARGE_BYTES // (10 * 4)
    x = np.random.default_rng(0).random((rows, 64), np.float32)
    request = v2.ModelInferRequest(model_name="mlp", raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    result, small = await execute(worker, [Work(request.SerializeToString(), b"", None, b""), work(1)])
    assert not small.HasField("failure")
    (expected,) = OnnxModel.run(model_of(worker), {"x": x}, ["y"])
    np.testing.assert_allclose(told(result), expected.ravel(), rtol=1e-5)


async def test_shared_memory_is_read_on_a_thread(worker, monkeypatch):
    """A few bytes of a request may stand for a gigabyte there."""
    path = Path("/dev/shm") / f"ringmesh_test_{uuid.uuid4().hex}"
    path.write_bytes(np.full((1, 64), 3, np.float32).tobytes())
    threads = []
    read = Region.read

    def told_where(self, offset, size, field):
        threads.append(threading.get_ident())
        return read(self, offset, size, field)

    monkeypatch.setattr(Region, "read", told_where)
    try:
        worker.memory.register("region", f"/{path.name}", 0, 256)
        request = v2.ModelInferRequest(model_name="mlp")
        tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 64])
        tensor.parameters["shared_memory_region"].string_param = "region"
        tensor.parameters["shared_memory_byte_size"].int64_param = 256
        data = request.SerializeToString()
        await execute(worker, [work(2)])  # runs of such shapes are known to be quick
        assert run_inline(worker, [Work(data, b"", None, b"")]) is None
        (enveloped,) = await execute(worker, [Work(data, b"", None, b"")])
    finally:
        path.unlink()
    np.testing.assert_allclose(told(enveloped), answer(worker, 3)[0], rtol=1e-5)
    assert len(threads) == 1
    assert threading.get_ident() not in threads
