import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.codec.request import Decoded, SequenceStep
from services.inference.models.model_store import ModelStore
from services.inference.repository.repository import Directory
from services.inference.scheduling import sequencer
from services.runtime.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from tests import models
from tests.unit.inference.loaded import open_model

EXECUTOR = ThreadPoolExecutor(4)


def held(folder):
    """The model as a worker holds it."""
    store = ModelStore(Directory(folder.parent.parent), open_model, EXECUTOR)
    asyncio.run(store.load(folder.parent.name))
    return store.held.find(folder.parent.name, "")


@pytest.fixture(scope="module")
def accumulator(tmp_path_factory):
    return held(models.accumulator(tmp_path_factory.mktemp("repository")))


def step(sequence_id, value, *, start=False, end=False, rows=1):
    x = np.full((rows, 1), value, np.float32)
    sequence = SequenceStep(sequence_id, start, end) if sequence_id is not None else None
    return Decoded({"x": x}, rows, ("sum", "which"), {}, {}, ("sum",), sequence=sequence)


async def total(accumulator, *args, **kwargs):
    result = await accumulator.batcher.submit(step(*args, **kwargs), None)
    assert len(result.arrays) == 2
    return result.arrays[0].item()


def test_callers_see_neither_controls_nor_state(accumulator):
    model = accumulator.model
    assert (set(model.inputs), set(model.outputs)) == ({"x"}, {"sum", "which"})
    assert (bool(model.cacheable), bool(model.batchable)) == (False, True)
    assert "sequences" in model.cacheable.reason


async def test_a_sequence_remembers_and_begins_anew(accumulator):
    assert await total(accumulator, 7, 1, start=True) == 1
    assert await total(accumulator, 7, 2) == 3
    assert await total(accumulator, 7, 5, start=True) == 5
    assert await total(accumulator, 7, 1, end=True) == 6
    with pytest.raises(FailedPreconditionError, match="no sequence 7"):
        await total(accumulator, 7, 1)


async def test_the_model_is_told_which_sequence_it_is(accumulator):
    result = await accumulator.batcher.submit(step(41, 1, start=True, end=True), None)
    assert result.arrays[1].item() == 41
    with pytest.raises(InvalidArgumentError, match="INT64"):
        await total(accumulator, "not a number", 1, start=True)


async def test_a_request_of_no_sequence_or_of_two_rows_is_told_so(accumulator):
    with pytest.raises(InvalidArgumentError, match="sequence_id"):
        await total(accumulator, None, 1)
    with pytest.raises(InvalidArgumentError, match="one row, not 2"):
        await total(accumulator, 1, 1, start=True, rows=2)


async def test_a_deadline_passes_on_time_though_the_request_before_it_in_its_sequence_runs(accumulator, monkeypatch):
    batcher, done = accumulator.batcher._batcher, asyncio.Event()

    async def slow(decoded, deadline):
        await done.wait()
        return await batcher.submit(decoded, deadline)

    monkeypatch.setattr(accumulator.batcher, "_batcher", SimpleNamespace(submit=slow))
    running = asyncio.create_task(total(accumulator, 9, 1, start=True))
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        with pytest.raises(DeadlineExceededError, match="before it in its sequence"):
            await accumulator.batcher.submit(step(9, 2), time.monotonic() + 0.01)
    done.set()
    assert await running == 1
    assert await total(accumulator, 9, 5, end=True) == 6


async def test_many_sequences_are_bounded(accumulator, monkeypatch):
    monkeypatch.setattr(sequencer, "MAX_SEQUENCES", 2)
    await total(accumulator, 100, 1, start=True)
    await total(accumulator, 101, 1, start=True)
    with pytest.raises(ResourceExhaustedError, match="2 sequences"):
        await total(accumulator, 102, 1, start=True)
    await total(accumulator, 100, 1, end=True)
    await total(accumulator, 102, 1, start=True, end=True)
    await total(accumulator, 101, 1, end=True)


async def test_an_idle_sequence_is_forgotten(tmp_path, monkeypatch):
    folder = models.accumulator(tmp_path)
    model = await asyncio.to_thread(held, folder)
    now = [100.0]
    monkeypatch.setattr(sequencer.time, "monotonic", lambda: now[0])
    await total(model, 1, 1, start=True)
    now[0] += 4.9
    assert await total(model, 1, 1) == 2
    now[0] += 5.1
    with pytest.raises(FailedPreconditionError, match="idle for more than 5 s"):
        await total(model, 1, 1)


async def test_idle_sequences_are_dropped_without_another_request(tmp_path, monkeypatch):
    model = await asyncio.to_thread(held, models.accumulator(tmp_path))
    monkeypatch.setattr(sequencer, "_LEAST_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(model.batcher, "_idle", 0.01)
    await total(model, 1, 1, start=True)
    assert model.batcher._sequences
    async with asyncio.timeout(60):
        while model.batcher._sequences:
            await asyncio.sleep(0.01)


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.integers(1, 99), st.lists(st.integers(-9, 9), min_size=1, max_size=5), max_size=12))
def test_sequences_that_run_side_by_side_add_up_as_if_alone(accumulator, sequences):
    async def run_all():
        # All at once: within a sequence they are submitted in order and none waits for an answer.
        steps = [
            (name, value, index == 0, index == len(values) - 1)
            for name, values in sequences.items()
            for index, value in enumerate(values)
        ]
        queues = {name: [index for index in range(len(steps)) if steps[index][0] == name] for name in sequences}
        mixed = []
        chooser = random.Random(len(steps))
        while left := [name for name in queues if queues[name]]:
            mixed.append(queues[chooser.choice(left)].pop(0))
        tasks = {
            index: asyncio.ensure_future(
                total(accumulator, steps[index][0], steps[index][1], start=steps[index][2], end=steps[index][3])
            )
            for index in mixed
        }
        return [await tasks[index] for index in range(len(steps))]

    expected = [sum(values[: index + 1]) for values in sequences.values() for index in range(len(values))]
    assert asyncio.run(run_all()) == expected


async def test_requests_of_several_sequences_share_a_batch(accumulator):
    accumulator.batcher._batcher._row_ns.clear()  # what runs of earlier tests took decides whether these share one
    steps = [step(name, name, start=True, end=True) for name in range(2, 8)]
    results = await asyncio.gather(*(accumulator.batcher.submit(made, None) for made in steps))
    assert [result.arrays[0].item() for result in results] == [2, 3, 4, 5, 6, 7]
    assert {result.batch_rows for result in results} == {6}


async def test_a_failed_request_changes_nothing(accumulator):
    await total(accumulator, 5, 3, start=True)
    wrong = step(5, 1)
    wrong.arrays["x"] = np.ones((1, 2), np.float32)
    with pytest.raises(InvalidArgumentError):
        await accumulator.batcher.submit(wrong, None)
    assert await total(accumulator, 5, 1, end=True) == 4


def test_a_state_may_begin_with_what_a_file_holds(tmp_path):
    folder = models.accumulator(tmp_path)
    config = folder.parent / "config.pbtxt"
    ten = 'initial_state { dims: [1] name: "ten" data_type: TYPE_FP32 data_file: "ten" }'
    text = config.read_text().replace("dims: [1] }", f"dims: [1] {ten} }}")
    config.write_text(text.replace("int32_false_true: [0, 1]", "int32_false_true: [0, 0]"))
    with pytest.raises(InvalidArgumentError, match="initial_state/ten, which cannot be read"):
        held(folder)
    (folder.parent / "initial_state").mkdir()
    (folder.parent / "initial_state/ten").write_bytes(np.array([10], np.float32).tobytes())
    assert asyncio.run(total(held(folder), 1, 1, start=True)) == 11


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name: "start"', 'name: "begin"', "no such input"),
        ('output_name: "total_out"', 'output_name: "total"', "no such output"),
        ("int32_false_true: [0, 1]", "fp32_false_true: [0, 1]", "int32_false_true"),
        ("dims: [1]", "dims: [2]", "dims"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(tmp_path, old, new, words):
    folder = models.accumulator(tmp_path)
    config = folder.parent / "config.pbtxt"
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(InvalidArgumentError, match=words):
        held(folder)
