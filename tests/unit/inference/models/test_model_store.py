import asyncio
import errno
import os
import resource
import shutil
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from services.inference.codec.request import decode_request
from services.inference.codec.shared_memory import SharedMemory
from services.inference.execution.model import ModelLoadError, OnnxModel
from services.inference.models.decisions import Decision, Decisions
from services.inference.models.model_store import READY, UNAVAILABLE, ModelStore, Overrides
from services.inference.repository.repository import Directory
from services.runtime.errors import InvalidArgumentError, NotFoundError, UnavailableError
from services.runtime.machine.machine_fault import machine_fault
from tests import models
from tests.system.test_cache import fresh
from tests.unit.inference.loaded import EXECUTOR, open_model, store
from tests.unit.turns import turns


async def answer(made, value=1.0):
    held = made.held.find("mlp", "")
    request = fresh()
    request.raw_input_contents[0] = np.full((1, 64), value, np.float32).tobytes()
    return (await held.batcher.submit(decode_request(request, held.model, SharedMemory()), None)).arrays[0].tolist()


async def states(made):
    return [(line.name, line.version, line.state) for line in await made.index()]


async def test_a_reload_serves_the_new_files_under_another_digest(tmp_path):
    models.mlp(tmp_path, seed=0)
    made = await store(tmp_path)
    before, digest = await answer(made), made.held.find("mlp", "").model.digest
    models.mlp(tmp_path, seed=1)
    await made.load("mlp")
    assert await answer(made) != before
    assert made.held.find("mlp", "").model.digest != digest


async def test_a_reload_of_the_same_files_keeps_what_is_loaded(tmp_path):
    models.mlp(tmp_path)
    made = await store(tmp_path)
    held = made.held.find("mlp", "")
    await made.load("mlp")
    assert made.held.find("mlp", "") is held


async def test_a_broken_new_version_leaves_the_old_one_serving_and_says_why(tmp_path):
    models.mlp(tmp_path)
    made = await store(tmp_path)
    before = await answer(made)
    (models.mlp(tmp_path, version=2) / "model.onnx").write_bytes(b"broken")
    with pytest.raises(InvalidArgumentError, match=r"2/model\.onnx"):
        await made.load("mlp")
    assert await answer(made) == before
    index = {line.version: line for line in await made.index()}
    assert (index["1"].state, index["2"].state) == (READY, UNAVAILABLE)
    assert "model.onnx" in index["2"].reason


async def test_requests_under_way_are_answered_while_a_version_is_replaced(tmp_path):
    models.mlp(tmp_path)
    made = await store(tmp_path)
    stop = False
    answers = 0

    async def caller():
        nonlocal answers
        while not stop:
            await answer(made)
            answers += 1

    callers = [asyncio.create_task(caller()) for _ in range(4)]
    for seed in range(1, 6):
        models.mlp(tmp_path, seed=seed)
        await made.load("mlp")
    stop = True
    await asyncio.gather(*callers)
    assert answers > 5


async def test_an_unloaded_model_is_not_found_and_can_be_loaded_again(tmp_path):
    models.mlp(tmp_path)
    models.add_sub(tmp_path)
    made = await store(tmp_path)
    await made.unload("mlp")
    with pytest.raises(NotFoundError):
        made.held.find("mlp", "")
    assert await states(made) == [("add_sub", "1", READY), ("mlp", "1", UNAVAILABLE)]
    with pytest.raises(NotFoundError):
        await made.unload("mlp")
    await made.load("mlp")
    assert await states(made) == [("add_sub", "1", READY), ("mlp", "1", READY)]


async def test_a_model_that_failed_to_load_is_unavailable_with_the_reason(tmp_path):
    models.add_sub(tmp_path)
    (models.mlp(tmp_path) / "model.onnx").write_bytes(b"bro\x01ken")
    made = await store(tmp_path)
    with pytest.raises(UnavailableError, match=r"version 1 of model 'mlp' failed to load.*model\.onnx"):
        made.held.find("mlp", "1")
    models.mlp(tmp_path)
    await made.load("mlp")
    assert made.held.find("mlp", "").loaded
    assert made.held.failures == {}
    await made.unload("mlp")
    with pytest.raises(NotFoundError):
        made.held.find("mlp", "")


async def test_a_reason_is_one_line_of_text_whatever_the_file_holds(tmp_path):
    models.add_sub(tmp_path)
    (models.mlp(tmp_path).parent / "config.pbtxt").write_text('name: "a\\001\\nb"')
    made = await store(tmp_path)
    (reason,) = made.held.failures["mlp"].values()
    assert reason.isprintable()


async def test_a_deleted_model_leaves_the_index(tmp_path):
    for make in (models.mlp, models.add_sub, models.random):
        make(tmp_path)
    (tmp_path / "random/1/model.onnx").write_bytes(b"broken")
    made = await store(tmp_path)
    await made.unload("mlp")
    for name in ("mlp", "random"):
        shutil.rmtree(tmp_path / name)
    assert await states(made) == [("add_sub", "1", READY)]
    polling = asyncio.create_task(made.poll(0.01))
    models.random(tmp_path)
    async with asyncio.timeout(60):
        while not made.held.of("random"):
            await asyncio.sleep(0.01)
    shutil.rmtree(tmp_path / "random")
    async with asyncio.timeout(60):
        while made.held.of("random"):
            await asyncio.sleep(0.01)
    polling.cancel()
    assert await states(made) == [("add_sub", "1", READY)]
    assert made.held.failures == {}


async def test_one_broken_model_does_not_keep_the_others_from_serving(tmp_path):
    models.mlp(tmp_path)
    (models.add_sub(tmp_path) / "model.onnx").write_bytes(b"broken")
    assert await states(await store(tmp_path)) == [("add_sub", "1", UNAVAILABLE), ("mlp", "1", READY)]


async def test_a_repository_of_which_nothing_loads_is_listed_with_the_causes_and_polling_finds_the_repair(tmp_path):
    (models.mlp(tmp_path) / "model.onnx").write_bytes(b"broken")
    made = await store(tmp_path)
    (line,) = await made.index()
    assert (line.name, line.state) == ("mlp", UNAVAILABLE)
    assert "mlp/1/model.onnx: it is no ONNX model" in line.reason
    assert not made.usable.is_set()
    polling = asyncio.create_task(made.poll(0.01))
    models.mlp(tmp_path)
    async with asyncio.timeout(60):
        while await states(made) != [("mlp", "1", READY)]:
            await asyncio.sleep(0.01)
    polling.cancel()
    assert made.usable.is_set()


async def test_a_store_is_usable_if_all_models_are_unloaded_and_stays_so(tmp_path):
    models.mlp(tmp_path / "models")
    decisions = Decisions(tmp_path / "decisions", 1 << 20)
    before = ModelStore(Directory(tmp_path / "models"), open_model, EXECUTOR, decisions=decisions)
    await before.load_all()
    await before.unload("mlp")
    assert before.usable.is_set()
    after = ModelStore(Directory(tmp_path / "models"), open_model, EXECUTOR, decisions=decisions)
    await after.load_all()
    assert [*after.held] == []
    assert after.usable.is_set()


async def test_a_store_is_usable_once_polling_finds_its_last_failed_model_deleted(tmp_path):
    models.mlp(tmp_path / "models")
    (models.add_sub(tmp_path / "models") / "model.onnx").write_bytes(b"broken")
    decisions = Decisions(tmp_path / "decisions", 1 << 20)
    decisions.keep("mlp", Decision(False, 1))
    made = ModelStore(Directory(tmp_path / "models"), open_model, EXECUTOR, decisions=decisions)
    await made.load_all()
    assert not made.usable.is_set()
    polling = asyncio.create_task(made.poll(0.01))
    shutil.rmtree(tmp_path / "models/add_sub")
    async with asyncio.timeout(60):
        await made.usable.wait()
    polling.cancel()


async def test_a_store_is_not_usable_by_an_ensemble_whose_steps_failed_to_load(tmp_path):
    models.pipeline(tmp_path)
    for model in tmp_path.glob("*/1/model.onnx"):
        model.write_bytes(b"broken")
    made = await store(tmp_path)
    assert [held.model.name for held in made.held] == ["pipeline"]
    assert not made.usable.is_set()


async def test_a_model_added_to_the_repository_is_listed_before_it_is_loaded(tmp_path):
    models.mlp(tmp_path)
    made = await store(tmp_path)
    models.add_sub(tmp_path)
    assert ("add_sub", "", UNAVAILABLE) in await states(made)


async def test_a_load_may_bring_its_own_configuration(tmp_path):
    models.mlp(tmp_path)
    made = await store(tmp_path)
    digest = made.held.find("mlp", "").model.digest
    await made.load("mlp", Overrides(config='{"max_batch_size": 3}'))
    model = made.held.find("mlp", "").model
    assert model.max_batch_rows == 3
    assert model.digest != digest
    await made.load("mlp")
    assert made.held.find("mlp", "").model.digest == digest


async def test_a_load_may_bring_its_own_files(tmp_path):
    models.mlp(tmp_path, seed=0)
    made = await store(tmp_path)
    before = await answer(made)
    data = (models.mlp(tmp_path / "elsewhere", seed=1) / "model.onnx").read_bytes()
    await made.load("mlp", Overrides(config='{"backend": "onnxruntime"}', files={"7/model.onnx": data}))
    assert made.held.versions("mlp") == ["7"]
    assert await answer(made) != before
    labelled = '{"output": [{"name": "y", "label_filename": "y.txt"}]}'
    await made.load("mlp", Overrides(config=labelled, files={"7/model.onnx": data, "y.txt": b"cat"}))
    assert made.held.find("mlp", "").model.labels == {"y": (b"cat",)}


@pytest.mark.parametrize(
    "overrides",
    [
        Overrides(config="{"),
        Overrides(config='{"backend": "python"}'),
        Overrides(files={"1/model.onnx": b""}),
        Overrides(config="{}", files={"1/../../x": b""}),
        Overrides(config="{}", files={"one/model.onnx": b""}),
        Overrides(config="{}", files={"y.txt": b""}),
        Overrides(config='{"output": [{"name": "y", "label_filename": "../y"}]}', files={"../y": b""}),
    ],
)
async def test_a_load_with_wrong_overrides_changes_nothing(tmp_path, overrides):
    models.mlp(tmp_path)
    made = await store(tmp_path)
    held = made.held.find("mlp", "")
    with pytest.raises(InvalidArgumentError):
        await made.load("mlp", overrides)
    assert made.held.find("mlp", "") is held


async def test_polling_follows_the_repository(tmp_path):
    models.mlp(tmp_path, seed=0)
    made = await store(tmp_path)
    before = await answer(made)
    polling = asyncio.create_task(made.poll(0.02))
    models.mlp(tmp_path, seed=1)
    models.add_sub(tmp_path)
    async with asyncio.timeout(60):
        while await answer(made) == before or not made.held.of("add_sub"):
            await asyncio.sleep(0.01)
    shutil.rmtree(tmp_path / "add_sub")
    (models.mlp(tmp_path) / "model.onnx").write_bytes(b"broken")
    async with asyncio.timeout(60):
        while made.held.of("add_sub") or not any("model.onnx" in line.reason for line in await made.index()):
            await asyncio.sleep(0.01)
    assert await answer(made) != before
    assert not polling.done()
    polling.cancel()


async def test_polling_follows_the_deletion_of_the_only_model_and_a_model_after_it(tmp_path):
    models.mlp(tmp_path)
    made = await store(tmp_path)
    polling = asyncio.create_task(made.poll(0.01))
    shutil.rmtree(tmp_path / "mlp")
    async with asyncio.timeout(60):
        while made.held.of("mlp"):
            await asyncio.sleep(0.01)
    assert await made.index() == []
    models.add_sub(tmp_path)
    async with asyncio.timeout(60):
        while not made.held.of("add_sub"):
            await asyncio.sleep(0.01)
    polling.cancel()


class Counting(Directory):
    """Counts the polls that have ended."""

    polls = 0

    def fingerprint(self):
        try:
            return super().fingerprint()
        finally:
            self.polls += 1


@pytest.mark.parametrize("left", ["an empty mount point", "nothing", "a file"])
async def test_a_repository_that_is_lost_takes_no_model_with_it(tmp_path, left):
    repository = tmp_path / "repository"
    models.mlp(repository)
    source = Counting(repository)
    made = ModelStore(source, open_model, EXECUTOR)
    await made.load_all()
    repository.rename(tmp_path / "elsewhere")
    if left == "an empty mount point":
        repository.mkdir()
    elif left == "a file":
        repository.touch()
    source.polls = 0
    polling = asyncio.create_task(made.poll(0.001))
    async with asyncio.timeout(60):
        while source.polls < 5:  # two would be enough to follow a deletion
            await asyncio.sleep(0.001)
    assert made.held.of("mlp")
    polling.cancel()


async def test_polling_follows_a_version_that_is_a_link(tmp_path):
    releases = [models.mlp(tmp_path / f"release-{seed}", seed=seed) for seed in (0, 1)]
    version = tmp_path / "models/mlp/1"
    version.parent.mkdir(parents=True)
    version.symlink_to(releases[0])
    made = await store(tmp_path / "models")
    before = await answer(made)
    polling = asyncio.create_task(made.poll(0.02))
    version.with_name("new").symlink_to(releases[1])
    version.with_name("new").replace(version)
    async with asyncio.timeout(60):
        while await answer(made) == before:
            await asyncio.sleep(0.01)
    polling.cancel()


class Noisy(Directory):
    """`add_sub` has a log that is written to all the time."""

    polls = 0

    def fingerprint(self):
        self.polls += 1
        found = super().fingerprint()
        return found | {"add_sub": found["add_sub"] | {("train.log", self.polls, "")}}


async def test_a_model_that_keeps_changing_does_not_keep_others_from_being_followed(tmp_path):
    models.mlp(tmp_path, seed=0)
    models.add_sub(tmp_path)
    made = ModelStore(Noisy(tmp_path), open_model, EXECUTOR)
    await made.load_all()
    before, noisy = await answer(made), made.held.find("add_sub", "")
    polling = asyncio.create_task(made.poll(0.02))
    models.mlp(tmp_path, seed=1)
    async with asyncio.timeout(60):
        while await answer(made) == before:
            await asyncio.sleep(0.01)
    assert made.held.find("add_sub", "") is noisy
    polling.cancel()


def warm_up(folder, inputs):
    sample = f'name: "w" batch_size: 2 count: 3 inputs {{ key: "x" value {{ {inputs} }} }}'
    (folder.parent / "config.pbtxt").write_text(f"max_batch_size: 8 model_warmup {{ {sample} }}")


async def test_a_model_is_warmed_up_before_it_takes_traffic(tmp_path, monkeypatch):
    warm_up(models.mlp(tmp_path), "data_type: TYPE_FP32 dims: [64] random_data: true")
    runs = []
    compute = OnnxModel.compute
    monkeypatch.setattr(OnnxModel, "compute", lambda self, i, o: runs.append(i["x"].shape) or compute(self, i, o))
    await store(tmp_path)
    assert runs[-3:] == [(2, 64)] * 3  # after those of the probes


@pytest.mark.parametrize(
    "inputs", ["dims: [63] zero_data: true", 'dims: [64] input_data_file: "nowhere"'], ids=["shape", "file"]
)
async def test_a_warm_up_that_fails_keeps_the_version_from_serving(tmp_path, inputs):
    models.add_sub(tmp_path)
    warm_up(models.mlp(tmp_path), inputs)
    made = await store(tmp_path)
    (line,) = [line for line in await made.index() if line.name == "mlp"]
    assert line.state == UNAVAILABLE
    assert "model_warmup 'w'" in line.reason


async def test_what_is_not_acted_on_is_logged_once_for_models_and_ensembles(tmp_path, caplog):
    folder = models.mlp(tmp_path)
    models.pipeline(tmp_path, parameters='metric_tags { key: "a" value: "b" }')
    (folder.parent / "config.pbtxt").write_text("instance_group { passive: true } instance_group { passive: true }")
    await store(tmp_path)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        "model mlp/1: set but not acted on: instance_group.passive",
        "model pipeline/1: set but not acted on: metric_tags",
    ]


async def test_the_index_says_why_a_model_is_not_cached_and_whether_it_is_batched(tmp_path):
    models.mlp(tmp_path)
    models.random(tmp_path)
    reasons = {line.name: line.reason for line in await (await store(tmp_path)).index()}
    assert reasons["mlp"] == "batched: rows are proven independent"
    assert reasons["random"].startswith(
        "not cached: its graph holds RandomNormalLike; not batched: rows are not proven"
    )


@contextmanager
def descriptors(free):
    """With so many left for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + free, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


@pytest.mark.parametrize("free", range(4))
async def test_a_worker_out_of_descriptors_says_so_and_does_not_blame_the_model(tmp_path, free):
    made = await store(models.mlp(tmp_path).parent.parent)
    models.mlp(tmp_path, seed=1)
    with descriptors(free):
        (error,) = await asyncio.gather(made.load("mlp"), return_exceptions=True)
    assert (free and error is None) or (isinstance(error, UnavailableError) and "Too many open files" in error.message)
    assert ("mlp", "1", READY) in await states(made)
    await made.load("mlp")
    assert await states(made) == [("mlp", "1", READY)]


async def test_a_model_that_met_a_fault_of_the_machine_at_the_start_is_loaded_when_that_is_over(tmp_path):
    models.mlp(tmp_path)
    models.mlp(tmp_path, name="other")
    faulty = True

    def open_one(files):
        if faulty and files.name == "mlp":
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise ModelLoadError(f"cannot load: {type(error).__name__}") from None
        return open_model(files)

    made = ModelStore(Directory(tmp_path), open_one, EXECUTOR)
    await made.load_all()
    (line,) = [line for line in await made.index() if line.name == "mlp"]
    assert line.state == UNAVAILABLE
    assert "No space left on device" in line.reason
    polling = asyncio.create_task(made.poll(0.001))
    faulty = False
    async with asyncio.timeout(60):
        while not made.held.of("mlp"):
            await asyncio.sleep(0)
    polling.cancel()
    await made.close()


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (OSError(errno.EMFILE, "x"), "Too many open files"),
        (OSError(errno.ENOENT, "x"), ""),
        (MemoryError(), "Cannot allocate memory"),
        (RuntimeError("Load model from m failed:system error number 24"), "Too many open files"),
        (RuntimeError("Load model from m failed:system error number 2"), ""),
        (RuntimeError("open file w.bin fail, errcode = 12 - Cannot allocate memory"), "Cannot allocate memory"),
        (RuntimeError("Failed to allocate memory for requested buffer of size 4000"), "Cannot allocate memory"),
        (RuntimeError("std::bad_alloc"), "Cannot allocate memory"),
        (RuntimeError("can't start new thread"), "no thread can be started"),
        (RuntimeError("Node 24 (errno) is not an ONNX operator"), ""),
    ],
    ids=str,
)
def test_a_fault_of_the_machine_is_told_from_one_of_the_model(error, lacks):
    assert machine_fault(error) == lacks


async def test_instances_beyond_the_threads_of_a_model_wait_for_their_turn_on_the_cpu(tmp_path):
    (models.mlp(tmp_path).parent / "config.pbtxt").write_text("max_batch_size: 0 instance_group { count: 3 }")
    made = await store(tmp_path)
    held = made.held.find("mlp", "")
    gate, run = threading.Event(), held.model.run
    held.model.run = lambda inputs, outputs: run(inputs, outputs) if gate.wait(10) else []
    answers = [asyncio.create_task(answer(made)) for _ in range(2)]
    await turns()
    waiting = held.batcher.waiting
    gate.set()
    await asyncio.gather(*answers)
    assert waiting == 1
