import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.keys.epochs import Epochs
from cache.keys.keys import RequestHasher
from cache.mesh import Found
from cache.policy.worth_asking import NOT_WORTH, WORTH, Subject
from cache.tiers.entry import Entry
from cache.tiers.local_tier import LocalTier
from router.balancing.catalog import ModelEntry
from router.dispatch.attempts import FatalRequestError
from router.request.rows import MAX_ROWS, RowCache, RowFailedError, UnlikeRowsError, cut_response, join, smaller, split
from services.runtime import driver
from services.runtime.errors import InternalError, UnavailableError
from services.runtime.oip.tensors import DATATYPES, decode, encode
from services.runtime.single_flight import SingleFlight
from services.runtime.verdict import YES
from tests.unit.turns import turns

HASHER = RequestHasher("secret")
MODEL = ModelEntry("m", "1", b"d" * 16, YES, v2.ModelMetadataResponse(), outputs=("y",))


def tensors_of(values):
    """Columns of an FP32, an INT8 and a BYTES input, from a list of small numbers."""
    array = np.array(values)
    texts = np.empty((len(values), 1), object)
    texts[:, 0] = [b"x" * value for value in values]
    return {
        "f": ("FP32", np.stack([array, array + 0.5], axis=1).astype(np.float32)),
        "i": ("INT8", array.astype(np.int8).reshape(-1, 1, 1)),
        "s": ("BYTES", texts),
    }


def request(values, *, typed=False):
    made = v2.ModelInferRequest(model_name="m")
    for name, (datatype, array) in tensors_of(values).items():
        tensor = made.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if typed:
            getattr(tensor.contents, DATATYPES[datatype].contents).extend(array.ravel().tolist())
        else:
            made.raw_input_contents.append(encode(array))
    return made


def response(values):
    made = v2.ModelInferResponse(model_name="m", model_version="1")
    for name, (datatype, array) in tensors_of(values).items():
        made.outputs.add(name=name, datatype=datatype, shape=array.shape)
        made.raw_output_contents.append(encode(array))
    return made.SerializeToString()


VALUES = st.lists(st.integers(0, 9), min_size=2, max_size=12)


@given(VALUES, st.booleans(), st.data())
def test_a_smaller_batch_has_the_rows_asked_for_and_nothing_else(values, typed, data):
    batch = split(request(values, typed=typed))
    rows = data.draw(st.lists(st.sampled_from(range(len(values))), min_size=1, max_size=len(values)))
    assert smaller(batch, rows) == request([values[row] for row in rows])


@given(VALUES, st.booleans())
def test_a_row_has_the_key_that_it_has_as_a_request_of_its_own(values, typed):
    batch = split(request(values, typed=typed))
    assert HASHER.hash_rows(batch.request, batch.rows) == [HASHER.hash(request([value])) for value in values]


@given(VALUES)
def test_a_response_is_its_rows_and_its_rows_are_the_response(values):
    rows = cut_response(response(values), len(values))
    assert rows == [response([value]) for value in values]
    assert join(rows) == response(values)


def with_shape(shape):
    made = request([1, 2])
    made.inputs[0].shape[:] = shape
    return made


def test_more_rows_than_the_model_takes_are_for_its_worker_to_refuse():
    assert split(request([1, 2, 3, 4]), 4) is not None
    assert split(request([1, 2, 3, 4, 5]), 4) is None


@pytest.mark.parametrize(
    "made",
    [
        request([1]),
        request([1] * (MAX_ROWS + 1)),
        with_shape([3, 2]),
        with_shape([2, 3]),
        with_shape([2, -1]),
        with_shape([]),
        v2.ModelInferRequest(),
        v2.ModelInferRequest.FromString(request([1, 2]).SerializeToString() + b"\x3a\x00"),  # one more raw
    ],
    ids=[
        "one row",
        "too many",
        "rows that differ",
        "data that does not fit",
        "negative",
        "scalar",
        "empty",
        "a raw more",
    ],
)
def test_what_is_no_batch_of_rows_is_left_whole(made):
    assert split(made) is None


def test_a_request_for_classes_is_left_whole():
    made = request([1, 2])
    made.outputs.add(name="y").parameters["classification"].int64_param = 1
    assert split(made) is None


def test_rows_that_do_not_fit_together_are_no_answer():
    with pytest.raises(UnlikeRowsError):
        cut_response(response([1, 2]), 3)
    other = v2.ModelInferResponse.FromString(response([1]))
    other.outputs[0].shape[:] = [1, 1]
    with pytest.raises(UnlikeRowsError):
        join([response([1]), other.SerializeToString()])


def test_an_answer_with_more_contents_than_outputs_has_no_rows():
    whole = v2.ModelInferResponse.FromString(response([1, 2]))
    whole.raw_output_contents.append(b"")
    with pytest.raises(UnlikeRowsError):
        cut_response(whole.SerializeToString(), 2)


class FakeMesh:
    def __init__(self):
        self.local = LocalTier(1 << 20)
        self.shared = {}
        self.purges = SimpleNamespace(oldest_ms=0)
        self.flights = SingleFlight()

        self.decision = WORTH
        self.written = []

    def decide(self, key, subject):
        return self.decision

    def learn(self, subject, seconds):
        pass

    async def look_up(self, key, subject):
        await asyncio.sleep(0)
        return self.shared.get(key)

    def fill(self, computed, *, writes):
        self.local.put(computed.key, computed.entry)
        if writes:
            self.written.append(computed.key)


class FakeWorker:
    """Echoes; `computed` has the values of each batch. Waits for `gate` where there is one."""

    def __init__(self, digest=MODEL.digest):
        self.computed = []
        self.digest = digest
        self.gate = None
        self.failures = []

    async def __call__(self, data, request_hash):
        made = v2.ModelInferRequest.FromString(data)
        values = decode(DATATYPES["INT8"], made.inputs[1].shape, made.raw_input_contents[1], "i").ravel().tolist()
        self.computed.append(values)
        if self.gate is not None:
            await self.gate.wait()
        if self.failures:
            raise self.failures.pop()
        timing = inference_pb2.Timing(compute_us=100 * len(values), batch_requests=1, batch_rows=len(values))
        return inference_pb2.WorkResult(response=response(values), model_digest=self.digest, timing=timing), "w"


def key_of(values):
    return MODEL.digest + HASHER.hash(request(values))


async def find(cache, values, worker):
    subject = Subject("m", MODEL.digest, 100)
    finding = cache.find(split(request(values)), MODEL, None, Epochs({}), key_of(values), subject, worker, "acme")
    return await driver.run(finding)


async def test_a_batch_of_eight_of_which_six_are_known_costs_two():
    cache, worker = RowCache(FakeMesh(), HASHER), FakeWorker()
    await find(cache, [1, 2, 3], worker)
    await find(cache, [4, 5, 6], worker)
    found = await find(cache, [1, 2, 7, 3, 4, 8, 5, 6], worker)
    assert worker.computed == [[1, 2, 3], [4, 5, 6], [7, 8]]
    assert found.entry.value == response([1, 2, 7, 3, 4, 8, 5, 6])
    assert (found.outcome, found.rows, found.worker, found.entry.compute_us) == ("miss", "6/8", "w", 200)


async def test_equal_rows_of_one_batch_are_computed_once():
    worker = FakeWorker()
    found = await find(RowCache(FakeMesh(), HASHER), [1, 2, 1, 1], worker)
    assert worker.computed == [[1, 2]]
    assert found.entry.value == response([1, 2, 1, 1])


async def test_rows_in_the_shared_tier_are_not_computed():
    mesh, worker = FakeMesh(), FakeWorker()
    key = key_of([2])
    mesh.shared[key] = Entry(response([2]), 50)
    found = await find(RowCache(mesh, HASHER), [1, 2], worker)
    assert (worker.computed, found.outcome, found.rows) == ([[1]], "miss", "1/2")
    assert found.entry.value == response([1, 2])


async def test_with_all_rows_known_nothing_is_computed_and_the_whole_is_kept_for_the_next_time():
    mesh, worker = FakeMesh(), FakeWorker()
    cache = RowCache(mesh, HASHER)
    await find(cache, [1, 2, 3], worker)
    found = await find(cache, [3, 1], worker)
    assert (found.outcome, found.rows) == ("hit-local", "2/2")
    assert worker.computed == [[1, 2, 3]]
    assert mesh.local.get(key_of([3, 1])).value == response([3, 1])


async def test_rows_in_flight_are_joined_and_outlive_the_caller_that_started_them():
    cache, worker = RowCache(FakeMesh(), HASHER), FakeWorker()
    worker.gate = asyncio.Event()
    first = asyncio.create_task(find(cache, [1, 2], worker))
    await turns()
    second = asyncio.create_task(find(cache, [2, 3], worker))
    await turns()
    first.cancel()
    worker.gate.set()
    assert (await second).entry.value == response([2, 3])
    assert worker.computed == [[1, 2], [3]]
    assert not cache._flights._flights


async def test_batches_that_overlap_in_flight_compute_each_row_once():
    cache, worker = RowCache(FakeMesh(), HASHER), FakeWorker()
    worker.gate = asyncio.Event()
    windows = [[*range(start, start + 8)] for start in range(33)]
    finding = [asyncio.create_task(find(cache, values, worker)) for values in windows]
    while len(worker.computed) < 33:  # each leads the one row that those before it do not have
        await asyncio.sleep(0)
    worker.gate.set()
    for values, found in zip(windows, await asyncio.gather(*finding), strict=True):
        assert found.entry.value == response(values)
    assert sorted(value for values in worker.computed for value in values) == [*range(40)]


async def test_a_failure_of_another_caller_is_not_ours():
    cache, worker = RowCache(FakeMesh(), HASHER), FakeWorker()
    worker.gate = asyncio.Event()
    worker.failures = [UnavailableError("gone")]
    first = asyncio.create_task(find(cache, [1, 2], worker))
    await turns()
    second = asyncio.create_task(find(cache, [2, 1], worker))
    await turns()
    worker.gate.set()
    with pytest.raises(UnavailableError):
        await first
    assert (await second).entry.value == response([2, 1])
    assert worker.computed == [[1, 2], [2, 1]]


async def test_rows_that_ended_their_workers_are_not_sent_again_by_those_that_joined():
    mesh, worker = FakeMesh(), FakeWorker()
    cache = RowCache(mesh, HASHER)
    worker.gate = asyncio.Event()
    worker.failures = [FatalRequestError("2 workers ended while they had it")]
    calls = []
    for values in ([1, 2], [2, 1], [1, 2, 1]):
        calls.append(asyncio.create_task(find(cache, values, worker)))
        await turns()
    worker.gate.set()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in ended] == [FatalRequestError] * 3
    assert worker.computed == [[1, 2]]


async def test_a_fault_of_ours_ends_the_rows_that_it_met_and_is_told_as_one():
    cache, worker = RowCache(FakeMesh(), HASHER), FakeWorker()
    worker.failures = [ValueError("secret")]
    with pytest.raises(InternalError) as caught:
        await find(cache, [1, 2], worker)
    assert "secret" not in caught.value.message
    assert not cache._flights._flights
    assert (await find(cache, [1, 2], worker)).entry.value == response([1, 2])


def alone(mesh, value, worker):
    """A request of one row, as the mesh runs it."""
    key = key_of([value])

    async def work():
        result, _ = await worker(request([value]).SerializeToString(), b"")
        entry = Entry(result.response, 1)
        mesh.local.put(result.model_digest + key[16:], entry)
        return Found(entry, "miss", "w")

    return driver.run(mesh.flights.run(key, work, None))


@pytest.mark.parametrize("first", ["batch", "alone"])
async def test_a_row_in_flight_is_joined_whether_it_is_in_a_batch_or_alone(first):
    mesh, worker = FakeMesh(), FakeWorker()
    cache = RowCache(mesh, HASHER)
    worker.gate = asyncio.Event()
    calls = [find(cache, [1, 2], worker), alone(mesh, 2, worker)]
    tasks = []
    for call in calls if first == "batch" else calls[::-1]:
        tasks.append(asyncio.create_task(call))
        await turns()
    worker.gate.set()
    batch, single = await asyncio.gather(*(tasks if first == "batch" else tasks[::-1]))
    assert batch.entry.value == response([1, 2])
    assert single[0].entry.value == response([2])
    assert worker.computed == ([[1, 2]] if first == "batch" else [[2], [1]])


async def test_who_joined_a_row_of_a_batch_that_failed_asks_for_it_again():
    mesh, worker = FakeMesh(), FakeWorker()
    worker.gate, worker.failures = asyncio.Event(), [UnavailableError("gone")]
    batch = asyncio.create_task(find(RowCache(mesh, HASHER), [1, 2], worker))
    await turns()
    single = asyncio.create_task(alone(mesh, 2, worker))
    await turns()
    worker.gate.set()
    with pytest.raises(RowFailedError):
        await single
    with pytest.raises(UnavailableError):
        await batch
    assert (await alone(mesh, 2, worker))[0].entry.value == response([2])


async def test_a_row_that_another_model_computed_meanwhile_is_not_put_into_the_batch():
    mesh, worker, replaced = FakeMesh(), FakeWorker(), FakeWorker(digest=b"n" * 16)
    replaced.gate = asyncio.Event()
    single = asyncio.create_task(alone(mesh, 2, replaced))
    await turns()
    batch = asyncio.create_task(find(RowCache(mesh, HASHER), [1, 2], worker))
    await turns()
    replaced.gate.set()
    await single
    assert (await batch).entry.value == response([1, 2])
    assert worker.computed == [[1], [2]]


async def test_rows_of_two_models_are_never_joined():
    cache, worker = RowCache(FakeMesh(), HASHER), FakeWorker()
    await find(cache, [1, 2], worker)
    assert await find(cache, [1, 3], FakeWorker(digest=b"n" * 16)) is None


@pytest.mark.parametrize("decision", [WORTH, NOT_WORTH])
async def test_rows_are_looked_up_in_the_shared_tier_and_written_there_only_if_that_pays(decision):
    mesh, worker = FakeMesh(), FakeWorker()
    mesh.decision = decision
    held = key_of([1])
    mesh.shared[held] = Entry(response([1]), 1)
    found = await find(RowCache(mesh, HASHER), [1, 2], worker)
    assert found.entry.value == response([1, 2])
    assert worker.computed == ([[2]] if decision is WORTH else [[1, 2]])
    assert len(mesh.written) == (decision is WORTH)


async def test_rows_from_before_a_purge_are_not_found():
    mesh, worker = FakeMesh(), FakeWorker()
    cache = RowCache(mesh, HASHER)
    await find(cache, [1, 2], worker)
    mesh.purges.oldest_ms = 1 << 60
    await find(cache, [2, 1], worker)
    assert worker.computed == [[1, 2], [2, 1]]


async def test_a_tenant_is_charged_for_the_answer_and_for_the_rows_that_were_not_held():
    charged = []
    limits = SimpleNamespace(cache=SimpleNamespace(keep=lambda *charge: charged.append(charge)))
    mesh, worker = FakeMesh(), FakeWorker()
    await find(RowCache(mesh, HASHER), [1, 2], worker)
    await find(RowCache(mesh, HASHER, limits), [1, 3], worker)
    assert charged == [("acme", key_of(values), len(response(values))) for values in ([1, 3], [3])]
