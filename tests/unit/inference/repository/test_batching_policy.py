"""What config.pbtxt says of batching is what it says in Triton; each row of the table is one configuration."""

import asyncio
from typing import NamedTuple

import numpy as np
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.codec.request import decode_request
from services.inference.codec.shared_memory import SharedMemory
from services.inference.execution.model import ModelLoadError
from services.inference.models.ensemble import Ensemble
from services.inference.models.model_store import Overrides
from services.runtime.errors import InvalidArgumentError
from tests import models
from tests.unit.inference.loaded import load, store

CALLERS = 6
# RINGMESH_MAX_BATCH_ROWS.
WORKERS_ROWS = 16

INPUT = 'input { name: "x" data_type: TYPE_FP32 dims: [64] }'
OUTPUT = 'output { name: "y" data_type: TYPE_FP32 dims: [10] }'
COMPLETE = INPUT + OUTPUT
COMPLETE_WITH_BATCH = COMPLETE.replace("dims: [", "dims: [-1, ")


class Served(NamedTuple):
    """`together`: requests in a run where all callers come at once. `told`: max_batch_size and dynamic_batching in
    ModelConfig. `most`: rows of a request, 0 where any number is taken."""

    together: int
    told: tuple[int, bool]
    most: int


MERGED = Served(CALLERS, (8, True), 8)
ALONE = Served(1, (8, False), 8)
NO_BATCH = Served(1, (0, False), 0)
# Nobody says: Ringmesh decides by the model, up to the worker's own limit.
BY_MODEL = Served(CALLERS, (WORKERS_ROWS, True), 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Complete: nothing is added.
        (COMPLETE + "max_batch_size: 8", ALONE),
        (COMPLETE + "max_batch_size: 8 dynamic_batching { }", MERGED),
        (COMPLETE + "max_batch_size: 1 dynamic_batching { }", Served(1, (1, True), 1)),
        (COMPLETE_WITH_BATCH, NO_BATCH),
        (COMPLETE_WITH_BATCH + "max_batch_size: 0", NO_BATCH),
        (COMPLETE_WITH_BATCH + "max_batch_size: 0 dynamic_batching { }", Served(1, (0, True), 0)),
        (COMPLETE_WITH_BATCH + "dynamic_batching { }", Served(1, (0, True), 0)),
        # Not complete, with a size: dynamic_batching is added, where there is more than one row.
        ("max_batch_size: 8", MERGED),
        (INPUT + "max_batch_size: 8", MERGED),
        (OUTPUT + "max_batch_size: 8", MERGED),
        ("max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 1 }", MERGED),
        ("max_batch_size: 1", Served(1, (1, False), 1)),
        # Not complete, without a size: Triton takes 4 where the first dimensions are free, Ringmesh looks at the model.
        ("", BY_MODEL),
        (INPUT, BY_MODEL),
        (OUTPUT.replace("[10]", "[-1, 10]"), BY_MODEL),
        ("dynamic_batching { }", BY_MODEL),
        # 0 that is said is no size left out: Triton cannot tell them apart.
        ("max_batch_size: 0", NO_BATCH),
        # Only what is said counts.
        ("# max_batch_size: 8", BY_MODEL),
        ('parameters { key: "note" value { string_value: "max_batch_size: 8" } }', BY_MODEL),
        # The same as JSON, from a load request.
        ('{"maxBatchSize": 8}', MERGED),
        ('{"max_batch_size": 0}', NO_BATCH),
        ('{"maxBatchSize": null}', BY_MODEL),
        ('{"parameters": {"max_batch_size": {"stringValue": "8"}}}', BY_MODEL),
    ],
)
async def test_a_configuration_means_what_it_means_in_triton(tmp_path, text, expected):
    held = await loaded(models.mlp(tmp_path), text)
    results = await asyncio.gather(*(held.batcher.submit(decoded(held, 1), None) for _ in range(CALLERS)))
    config = held.model.config()
    assert {result.batch_requests for result in results} == {expected.together}
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == expected.told
    decoded(held, expected.most or 100)
    if expected.most:
        with pytest.raises(InvalidArgumentError, match=rf"{expected.most + 1} rows.*'mlp'.* {expected.most} at most"):
            decoded(held, expected.most + 1)


async def test_nobody_else_is_in_the_run_of_a_request_whose_configuration_has_no_dynamic_batching(
    monkeypatch, tmp_path
):
    monkeypatch.setattr("services.inference.scheduling.batcher.QUICK_NS", 10**12, raising=False)
    held = await loaded(models.mlp(tmp_path), COMPLETE + "max_batch_size: 8")
    (one,) = await asyncio.gather(held.batcher.submit(decoded(held, 2), None))
    assert (one.batch_requests, one.batch_rows) == (1, 2)
    # Nor in one that is made on the event loop, nor with a request of no rows.
    for rows in (1, 0):
        requests = [decoded(held, 1), decoded(held, rows)]
        assert held.batcher.run_at_once(requests) is None
        results = await asyncio.gather(*(held.batcher.submit(request, None) for request in requests))
        assert [result.batch_requests for result in results] == [1, 1]


@pytest.mark.parametrize("text", ["max_batch_size: 4", COMPLETE + "max_batch_size: 4", "max_batch_size: 1"])
def test_a_batch_that_the_file_has_no_room_for_is_a_mistake(tmp_path, text):
    with pytest.raises(ModelLoadError):
        opened(models.hidden_random(tmp_path), text)


def test_dynamic_batching_without_a_size_is_nothing_to_a_file_without_a_free_dimension(tmp_path):
    model = opened(models.hidden_random(tmp_path), "dynamic_batching { }")
    assert (bool(model.batchable), model.config().max_batch_size) == (False, 0)
    assert "not free" in model.batchable.reason


def test_rows_that_depend_on_each_other_are_batched_only_if_the_configuration_says_so(tmp_path):
    for text, batched in (("", False), ("# max_batch_size: 8", False), ("max_batch_size: 8", True)):
        assert bool(opened(models.mean_over_rows(tmp_path), text).batchable) is batched


def test_dims_of_a_complete_configuration_without_a_size_have_the_batch_in_them(tmp_path):
    with pytest.raises(ModelLoadError, match=r"\[64\]; the file has \[-1, 64\].*max_batch_size"):
        opened(models.mlp(tmp_path), COMPLETE)


def test_rows_are_cached_where_requests_run_alone_only_if_the_owner_asks_for_it(tmp_path):
    alone = COMPLETE + "max_batch_size: 8"
    assert "dynamic_batching" in opened(models.mlp(tmp_path), alone).row_cache.reason
    asked = 'parameters { key: "ringmesh_row_cache" value { string_value: "true" } }'
    assert opened(models.mlp(tmp_path), f"{alone} {asked}").row_cache


def test_classes_are_those_of_each_row_where_requests_run_alone(tmp_path):
    model = opened(models.mlp(tmp_path), COMPLETE + "max_batch_size: 8")
    asked = v2.ModelInferRequest()
    asked.CopyFrom(request(3))
    asked.outputs.add(name="y").parameters["classification"].int64_param = 2
    assert decode_request(asked, model, SharedMemory()).rows == 3


async def test_an_ensemble_refuses_more_rows_than_it_says_and_so_do_its_steps(tmp_path):
    models.mlp(tmp_path)
    models.pipeline(tmp_path)
    (tmp_path / "mlp/config.pbtxt").write_text("max_batch_size: 4")
    held = (await started(tmp_path)).held.find("pipeline", "")
    assert isinstance(held.model, Ensemble)
    with pytest.raises(InvalidArgumentError, match=r"9 rows.*'pipeline' takes 8 at most"):
        decoded(held, 9, name="in")
    with pytest.raises(InvalidArgumentError, match=r"5 rows.*'mlp' takes 4 at most") as caught:
        await held.batcher.submit(decoded(held, 5, name="in"), None)
    assert caught.value.message.startswith("step 'mlp' of ensemble 'pipeline'")
    assert (await held.batcher.submit(decoded(held, 4, name="in"), None)).batch_rows == 4


def opened(folder, text):
    (folder.parent / "config.pbtxt").write_text(text)
    return load(folder, max_batch_rows=WORKERS_ROWS)


def started(repository):
    return store(repository, max_batch_rows=WORKERS_ROWS)


async def loaded(folder, text):
    """As a worker holds it; JSON comes with a load request."""
    name = folder.parent.name
    if text.startswith("{"):
        store = await started(folder.parent.parent)
        await store.load(name, Overrides(config=text))
    else:
        (folder.parent / "config.pbtxt").write_text(text)
        store = await started(folder.parent.parent)
    return store.held.find(name, "")


def request(rows, name="x"):
    made = v2.ModelInferRequest()
    made.inputs.add(name=name, datatype="FP32", shape=[rows, 64])
    made.raw_input_contents.append(np.ones((rows, 64), np.float32).tobytes())
    return made


def decoded(held, rows, name="x"):
    return decode_request(request(rows, name), held.model, SharedMemory())
