import asyncio
import shutil
import threading
import time

import numpy as np
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.api.service import describe
from services.inference.envelope import Work
from services.inference.execution.model import ModelLoadError
from services.inference.models import model_store
from services.inference.models.model_store import READY, UNAVAILABLE, ModelStore
from services.inference.repository.repository import Directory, versions
from services.inference.scheduling.batcher import Batcher
from services.inference.worker import Worker
from services.runtime import driver
from services.runtime.errors import DeadlineExceededError, InvalidArgumentError, UnavailableError
from tests import models
from tests.system.test_cache import fresh
from tests.unit.inference.loaded import EXECUTOR, open_model

NAMES = ["m0", "m1", "m2", "m3"]


@pytest.fixture
def repository(tmp_path):
    """Four models of one size, each with answers of its own."""
    for seed, name in enumerate(NAMES):
        models.mlp(tmp_path / "made", seed=seed)
        (tmp_path / "repository").mkdir(exist_ok=True)
        shutil.move(tmp_path / "made/mlp", tmp_path / "repository" / name)
    return tmp_path / "repository"


async def store(repository, room_for, open_model=open_model):
    """With room for so many of the models, whose memory is the size of their files."""
    (files,) = versions(repository, "m0")
    limit = int(files.size() * (room_for + 0.5))
    made = ModelStore(Directory(repository), open_model, EXECUTOR, memory_limit=limit, process_memory=lambda: 0)
    await made.load_all()
    return made


def worker(made):
    return Worker("w", made)


def request(name, value=1.0):
    message = fresh()
    message.model_name = name
    message.raw_input_contents[0] = np.full((1, 64), value, np.float32).tobytes()
    return message


async def ask(made, name, value=1.0, deadline=None):
    data = request(name, value).SerializeToString()
    (result,) = await driver.run(made.execute([Work(data, b"", deadline, b"")]))
    assert not result.HasField("failure"), result.failure.message
    return v2.ModelInferResponse.FromString(result.response).raw_output_contents[0]


def loaded(made):
    return {held.model.name for held in made.held if held.loaded}


def resident(made, name):
    return made.held.find(name, "").resident


async def expected(repository):
    made = worker(await store(repository, 4))
    return {name: await ask(made, name) for name in NAMES}


async def test_more_models_are_offered_than_fit_and_each_answers_as_ever(repository):
    answers = await expected(repository)
    made = await store(repository, 2)
    assert [(line.name, line.state) for line in await made.index()] == [(name, READY) for name in NAMES]
    for name in NAMES * 2:
        assert await ask(worker(made), name) == answers[name]
        assert len(loaded(made)) == 2
        assert name in loaded(made)


async def test_the_least_recently_used_makes_room(repository):
    made = await store(repository, 2)
    for name in ("m0", "m1", "m0", "m2"):
        await ask(worker(made), name)
    assert loaded(made) == {"m0", "m2"}


async def test_a_model_in_use_is_not_unloaded(repository):
    made = await store(repository, 1)
    first, second = made.held.find("m0", ""), made.held.find("m1", "")
    await first.resident.budget.enter(first.resident, None)
    waits = asyncio.create_task(second.resident.budget.load(second.resident))
    await asyncio.sleep(0.05)
    assert loaded(made) == {"m0"}
    first.resident.budget.leave(first.resident)
    await waits
    assert loaded(made) == {"m1"}


async def test_with_more_in_use_than_fit_every_request_is_answered(repository):
    answers = await expected(repository)
    made = await store(repository, 1)
    asked = worker(made)

    async def caller(number):
        for turn in range(6):
            name = NAMES[(number + turn) % 4]
            assert await ask(asked, name) == answers[name]

    async with asyncio.timeout(60):
        await asyncio.gather(*(caller(number) for number in range(16)))
    statistics = [held.statistics.message() for held in made.held]
    assert sum(message.inference_stats.success.count for message in statistics) == 16 * 6
    # Those that waited were answered together: far fewer loads than requests.
    assert sum(resident(made, name).loads for name in NAMES) < 16 * 6 / 2


class Gate:
    """Opens models, but not while it is shut."""

    def __init__(self):
        self.open = threading.Event()
        self.open.set()
        self.opened = []

    def __call__(self, files):
        self.open.wait(20)
        self.opened.append(files.name)
        return open_model(files)


async def test_requests_wait_for_one_load_each_within_its_own_deadline(repository):
    gate = Gate()
    made = await store(repository, 1, gate)
    asked = worker(made)
    gate.opened.clear()
    gate.open.clear()
    patient = [asyncio.create_task(ask(asked, "m0", value)) for value in range(3)]
    late = made.held.find("m0", "")
    with pytest.raises(DeadlineExceededError, match="loaded"):
        await late.resident.budget.enter(late.resident, time.monotonic() + 0.05)
    leaver = asyncio.create_task(ask(asked, "m0", 9))
    await asyncio.sleep(0)
    leaver.cancel()
    gate.open.set()
    assert len({await waiting for waiting in patient}) == 3
    assert gate.opened == ["m0"]
    await ask(asked, "m1")  # nothing keeps m0 in use
    assert loaded(made) == {"m1"}


async def test_a_model_that_can_never_fit_is_refused_with_what_it_takes(repository):
    models.slow(repository)
    made = await store(repository, 2)
    (line,) = [line for line in await made.index() if line.name == "slow"]
    assert line.state == UNAVAILABLE
    assert "RINGMESH_MODEL_MEMORY_BYTES" in line.reason


async def test_what_a_model_takes_is_what_the_process_grew_by(repository):
    (files,) = versions(repository, "m0")
    memory = iter([100, 100 + 3 * files.size(), 0, 0, 0, 0, 0, 0])
    made = ModelStore(
        Directory(repository), open_model, EXECUTOR, memory_limit=100 << 20, process_memory=lambda: next(memory)
    )
    await made.load_all()
    assert [resident(made, name).bytes for name in NAMES] == [3 * files.size(), *[files.size()] * 3]


async def test_files_that_change_while_their_model_is_unloaded_are_served_when_they_are_loaded(repository):
    made = await store(repository, 1)
    before = (await expected(repository))["m0"]
    digest = made.held.find("m0", "").model.digest
    asked = worker(made)
    for name in ("m0", "m1"):
        await ask(asked, name)
    shutil.copy(repository / "m3/1/model.onnx", repository / "m0/1/model.onnx")
    (result,) = await driver.run(asked.execute([Work(request("m0").SerializeToString(), b"", None, b"")]))
    assert v2.ModelInferResponse.FromString(result.response).raw_output_contents[0] == before
    assert result.model_digest == digest
    await made.load("m0")
    (result,) = await driver.run(asked.execute([Work(request("m0").SerializeToString(), b"", None, b"")]))
    assert v2.ModelInferResponse.FromString(result.response).raw_output_contents[0] != before
    assert result.model_digest == made.held.find("m0", "").model.digest != digest


async def test_a_model_that_cannot_be_loaded_again_is_told_and_tried_again(repository):
    broken = False

    def open_or_not(files):
        if broken and files.name == "m0":
            raise ModelLoadError(f"cannot load {files.model}: no memory")
        return open_model(files)

    made = await store(repository, 1, open_or_not)
    asked = worker(made)
    broken = True
    (result,) = await driver.run(asked.execute([Work(request("m0").SerializeToString(), b"", None, b"")]))
    assert result.failure.code == UnavailableError.code.value[0]
    assert f"{repository}/m0/1/model.onnx: no memory" in result.failure.message
    assert {line.name: line.state for line in await made.index()} == dict.fromkeys(NAMES, READY) | {"m0": UNAVAILABLE}
    broken = False
    await ask(asked, "m0")
    assert {line.state for line in await made.index()} == {READY}


async def test_a_request_whose_model_was_replaced_before_it_was_let_in_is_answered_by_the_new_one(repository):
    made = await store(repository, 1)
    old = made.held.find("m0", "")
    shutil.copy(repository / "m3/1/model.onnx", repository / "m0/1/model.onnx")
    await made.load("m0")
    asked = worker(made)
    work = Work(request("m0").SerializeToString(), b"", None, b"")
    result = await asked._run(b"", old, asked._reader.read(work.data), work, 0)
    assert result.model_digest == made.held.find("m0", "").model.digest


async def test_the_index_and_the_description_tell_what_is_in_memory(repository):
    made = await store(repository, 2)
    await ask(worker(made), "m1")
    await ask(worker(made), "m2")
    reasons = {line.name: line.reason for line in await made.index()}
    assert {name for name, reason in reasons.items() if "not in memory" in reason} == {"m0", "m3"}
    assert {describe(held).name for held in made.held if describe(held).unloaded} == {"m0", "m3"}


async def test_statistics_survive_an_unload(repository):
    made = await store(repository, 1)
    for name in ("m0", "m1", "m0"):
        await ask(worker(made), name)
    assert made.held.find("m0", "").statistics.message().inference_stats.success.count == 2


async def test_a_model_is_loaded_when_that_is_asked_for_and_taken_out_wherever_it_is(repository):
    made = await store(repository, 1)
    await made.load("m0")
    assert loaded(made) == {"m0"}
    await made.unload("m0")
    await made.unload("m1")
    assert loaded(made) == set()
    await made.load("m1")
    await ask(worker(made), "m1")
    assert loaded(made) == {"m1"}


async def test_a_version_is_replaced_beside_the_old_one_without_a_request_that_waits_or_fails(repository):
    gate = Gate()
    made = await store(repository, 1, gate)
    asked = worker(made)
    await ask(asked, "m0")
    gate.open.clear()
    shutil.copy(repository / "m3/1/model.onnx", repository / "m0/1/model.onnx")
    replacing = asyncio.create_task(made.load("m0"))
    before = await ask(asked, "m0")
    gate.open.set()
    await replacing
    assert await ask(asked, "m0") != before
    assert loaded(made) == {"m0"}


async def test_a_broken_version_gives_its_room_back(repository):
    made = await store(repository, 2)
    models.mlp(repository.parent / "other", seed=7)
    shutil.move(repository.parent / "other/mlp/1", repository / "m0/2")
    (repository / "m0/config.pbtxt").write_text("version_policy { all {} }")
    shutil.copytree(repository / "m0/2", repository / "m0/3")
    (repository / "m0/3/model.onnx").write_bytes(b"broken")
    with pytest.raises(InvalidArgumentError):
        await made.load("m0")
    for name in NAMES:
        await ask(worker(made), name)
    assert len(loaded(made)) == 2


async def test_an_ensemble_runs_though_its_steps_do_not_fit_together(tmp_path):
    models.mlp(tmp_path)
    models.pipeline(tmp_path)
    (files,) = versions(tmp_path, "mlp")
    made = ModelStore(
        Directory(tmp_path), open_model, EXECUTOR, memory_limit=files.size() + 10, process_memory=lambda: 0
    )
    await made.load_all()
    message = v2.ModelInferRequest(model_name="pipeline")
    message.inputs.add(name="in", datatype="FP32", shape=[1, 64])
    message.raw_input_contents.append(np.ones((1, 64), np.float32).tobytes())
    for _ in range(2):
        (result,) = await driver.run(worker(made).execute([Work(message.SerializeToString(), b"", None, b"")]))
        assert not result.HasField("failure"), result.failure.message
    assert loaded(made) == {"doubled", "pipeline"}


async def test_a_load_that_fails_for_any_reason_takes_no_memory(tmp_path, monkeypatch):
    for version in (1, 2):
        models.mlp(tmp_path, version=version)
    (tmp_path / "mlp/config.pbtxt").write_text("version_policy { all {} }")
    made = ModelStore(Directory(tmp_path), open_model, EXECUTOR, memory_limit=1 << 20, process_memory=lambda: 0)
    batchers = []

    def second_fails(*arguments, **options):
        if batchers:
            raise MemoryError
        batchers.append(Batcher(*arguments, **options))
        return batchers[0]

    monkeypatch.setattr(model_store, "Batcher", second_fails)
    with pytest.raises(MemoryError):
        await made.load("mlp")
    assert not made._budget._residents
    monkeypatch.undo()
    await made.load("mlp")
    assert len(made._budget._residents) == 2
