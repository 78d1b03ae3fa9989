"""What operators load and unload by request holds after a restart."""

import pytest
from ringmesh.inference.v1 import inference_pb2

from services.inference.api.service import EnvelopeService
from services.inference.models.decisions import Decision, Decisions, Overrides
from services.inference.models.model_store import READY, UNAVAILABLE, ModelStore
from services.inference.repository.repository import Directory
from services.inference.repository.snapshots import Snapshots
from services.inference.worker import Worker as InferenceWorker
from services.runtime.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError
from services.runtime.rpc.calls import Calls
from tests import models
from tests.unit.inference.loaded import EXECUTOR, open_model
from tests.unit.inference.models.test_model_store import answer, states

LIMIT = 1 << 20


class Worker:
    """One that is started again and again on the same folders."""

    def __init__(self, folder):
        self.repository, self.state = folder / "repository", folder / "state"
        self.store = None

    async def start(self, *, limit=LIMIT):
        if self.store is not None:
            await self.store.close()
        self.store = ModelStore(
            Directory(self.repository),
            open_model,
            EXECUTOR,
            snapshots=Snapshots(self.state / "snapshots"),
            decisions=Decisions(self.state / "decisions", limit),
        )
        await self.store.load_all()
        return self.store


@pytest.fixture
def worker(tmp_path):
    made = Worker(tmp_path)
    models.mlp(made.repository, seed=0)
    models.add_sub(made.repository)
    return made


def given(tmp_path, seed):
    data = (models.mlp(tmp_path / "elsewhere", seed=seed) / "model.onnx").read_bytes()
    return Overrides('{"backend": "onnxruntime"}', {"7/model.onnx": data})


async def test_a_model_that_was_unloaded_stays_out_after_a_restart_until_it_is_loaded(worker):
    store = await worker.start()
    await store.unload("mlp")
    store = await worker.start()
    assert await states(store) == [("add_sub", "1", READY), ("mlp", "", UNAVAILABLE)]
    await store.load("mlp")
    store = await worker.start()
    assert await states(store) == [("add_sub", "1", READY), ("mlp", "1", READY)]


async def test_a_worker_whose_models_were_all_unloaded_starts_again(worker):
    store = await worker.start()
    for name in ("mlp", "add_sub"):
        await store.unload(name)
    store = await worker.start()
    assert {state for _, _, state in await states(store)} == {UNAVAILABLE}


async def test_a_configuration_and_files_of_a_request_hold_after_a_restart_until_the_next_load(worker, tmp_path):
    store = await worker.start()
    before = await answer(store)
    await store.load("mlp", given(tmp_path, 5))
    after = await answer(store)
    assert after != before
    store = await worker.start()
    assert (store.held.versions("mlp"), await answer(store)) == (["7"], after)
    await store.load("mlp", Overrides('{"max_batch_size": 3}'))
    store = await worker.start()
    assert (store.held.find("mlp", "").model.max_batch_rows, await answer(store)) == (3, before)
    await store.load("mlp")
    store = await worker.start()
    assert store.held.find("mlp", "").model.max_batch_rows != 3


async def test_a_model_that_only_a_request_brought_comes_back(worker, tmp_path):
    store = await worker.start()
    await store.load("brought", given(tmp_path, 5))
    store = await worker.start()
    assert ("brought", "7", READY) in await states(store)


async def test_a_load_that_failed_decides_nothing(worker):
    store = await worker.start()
    with pytest.raises(InvalidArgumentError):
        await store.load("mlp", Overrides('{"backend": "onnxruntime"}', {"7/model.onnx": b"broken"}))
    with pytest.raises(NotFoundError):
        await store.unload("nobody")
    assert store.decisions.decided_ns == {}
    store = await worker.start()
    assert store.held.versions("mlp") == ["1"]


async def test_more_than_the_limit_is_refused_and_nothing_has_changed(worker, tmp_path):
    store = await worker.start(limit=30_000)
    before = await answer(store)
    await store.load("first", given(tmp_path, 1))
    with pytest.raises(ResourceExhaustedError, match="RINGMESH_DECISIONS_BYTES is 30000"):
        await store.load("mlp", given(tmp_path, 5))
    assert await answer(store) == before
    # The same again takes the place of the last.
    await store.load("first", given(tmp_path, 2))
    store = await worker.start(limit=30_000)
    assert store.held.versions("first") == ["7"]
    assert await answer(store) == before


async def test_a_copy_of_a_decision_under_another_name_is_ignored(worker, caplog):
    store = await worker.start()
    await store.unload("mlp")
    (path,) = [path for path in (worker.state / "decisions").iterdir() if path.name != "lock"]
    path.rename(path.with_name("0" * len(path.name)))
    store = await worker.start()
    assert "has the name of another model's file" in caplog.text
    assert ("mlp", "1", READY) in await states(store)


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-1], lambda data: data[:60] + b"?" + data[61:]]
)
async def test_a_damaged_decision_is_ignored_and_can_be_made_again(worker, damage, caplog):
    store = await worker.start()
    await store.unload("mlp")
    (path,) = [path for path in (worker.state / "decisions").iterdir() if path.name != "lock"]
    path.write_bytes(damage(path.read_bytes()))
    (path.parent / "half.partial").write_bytes(b"of a worker that was killed")
    store = await worker.start()
    assert "is ignored" in caplog.text
    assert ("mlp", "1", READY) in await states(store)
    await store.unload("mlp")
    store = await worker.start()
    assert ("mlp", "", UNAVAILABLE) in await states(store)
    assert not [*path.parent.glob("*.partial")]


async def test_polling_does_not_overrule_a_decision(worker, tmp_path):
    store = await worker.start()
    await store.unload("add_sub")
    await store.load("mlp", given(tmp_path, 5))
    after = await answer(store)
    models.mlp(worker.repository, seed=8)
    for name in ("mlp", "add_sub"):
        assert await store._follow(name, True)
        assert await store._follow(name, False)
    assert await answer(store) == after
    assert not store.held.of("add_sub")
    await store.load("mlp", Overrides('{"max_batch_size": 3}'))
    before = await answer(store)
    models.mlp(worker.repository, seed=9)
    assert await store._follow("mlp", True)
    assert await answer(store) != before
    assert store.held.find("mlp", "").model.max_batch_rows == 3


async def test_the_later_of_two_decisions_stands_whichever_comes_first(worker):
    store = await worker.start()
    await store.unload("mlp", decided_ns=200)
    await store.load("mlp", decided_ns=100)
    assert not store.held.of("mlp")
    await store.load("mlp", decided_ns=300)
    await store.unload("mlp", decided_ns=300)
    assert store.held.of("mlp")


def test_a_decision_made_now_is_later_than_the_last_whatever_the_clock_says(tmp_path):
    decisions = Decisions(tmp_path, LIMIT)
    decisions.keep("m", Decision(False, 1 << 62))
    assert decisions.next_ns("m") == (1 << 62) + 1


def test_a_folder_of_decisions_is_of_one_worker(tmp_path):
    decisions = Decisions(tmp_path, LIMIT)
    with pytest.raises(OSError, match="unavailable"):
        Decisions(tmp_path, LIMIT)
    decisions.close()
    Decisions(tmp_path, LIMIT)


class _FleetOfThread(set):
    """Of decisions that a thread goes on keeping while they are listed."""

    def __init__(self, decisions):
        super().__init__()
        self.decisions = decisions

    def __contains__(self, model):
        self.decisions.keep(f"{model}-again", Decision(False, 2))
        return super().__contains__(model)


async def test_a_worker_tells_its_decisions_while_a_thread_keeps_another(worker):
    store = await worker.start()
    await store.unload("mlp")
    store.decisions.fleet = _FleetOfThread(store.decisions)
    service = EnvelopeService(InferenceWorker("w", store))
    told = await service.service(Calls()).handlers["Describe"].unary_unary(b"", None)
    assert [decided.model for decided in inference_pb2.DescribeResponse.FromString(told).decisions] == ["mlp"]
