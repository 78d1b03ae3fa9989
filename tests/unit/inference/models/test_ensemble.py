import asyncio
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2.model_config_pb2 import ModelEnsembling

from router.balancing.catalog import ModelEntry
from router.request import ensembles
from services.inference.models.model_store import UNAVAILABLE
from services.runtime.errors import InvalidArgumentError
from services.runtime.oip import ensemble
from services.runtime.oip.ensemble import EnsembleError
from services.runtime.verdict import YES
from tests import models
from tests.unit.inference.loaded import store as store_of


def scheduling(*steps):
    """Each step is a model, the tensors it takes and those it makes; its own names are those of the tensors."""
    return ModelEnsembling(
        step=[
            ModelEnsembling.Step(model_name=name, input_map={t: t for t in takes}, output_map={t: t for t in makes})
            for name, takes, makes in steps
        ]
    )


def test_steps_stand_after_those_they_need():
    plan = ensemble.plan(scheduling(("last", "b", "c"), ("first", "a", "b")), "a", "c")
    assert [step.model for step in plan.steps] == ["first", "last"]
    assert [*map(list, plan.needs)] == [[], [0]]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([("one", "a", "b"), ("two", "a", "b")], "'b' is made twice"),
        ([("one", "a", "a")], "'a' is made twice"),
        ([("one", "x", "b")], "takes tensor 'x', which nothing makes"),
        ([("one", "a", "x")], "output 'b' is not made"),
        ([("one", "ay", "bx"), ("two", "x", "y")], "wait for one another: .*one"),
    ],
)
def test_what_is_not_a_graph_is_refused(steps, words):
    with pytest.raises(EnsembleError, match=words):
        ensemble.plan(scheduling(*steps), "a", "b")


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_graph_runs_each_step_once_with_what_it_needs(data):
    """Tensor n is the sum of those it takes plus n; steps stand in any order."""
    count = data.draw(st.integers(1, 8))
    takes = [data.draw(st.sets(st.integers(0, n - 1), min_size=1)) for n in range(1, count + 1)]
    steps = [(f"m{n}", [str(t) for t in sorted(takes[n - 1])], [str(n)]) for n in range(1, count + 1)]
    plan = ensemble.plan(scheduling(*data.draw(st.permutations(steps))), ["0"], [str(count)])
    ran = []

    async def run_step(index, inputs):
        ran.append(plan.steps[index].model)
        await asyncio.sleep(0)
        (made,) = plan.steps[index].outputs
        return {made: sum(inputs.values()) + int(made)}

    tensors = asyncio.run(ensemble.run(plan, {"0": 0}, run_step))
    expected = [0]
    for n in range(1, count + 1):
        expected.append(sum(expected[t] for t in takes[n - 1]) + n)
    assert tensors == {str(n): total for n, total in enumerate(expected)}
    assert sorted(ran) == sorted(name for name, _, _ in steps)


async def test_a_failing_step_ends_the_others():
    plan = ensemble.plan(scheduling(("bad", "a", "b"), ("slow", "a", "c"), ("after", "bc", "d")), "a", "d")
    ended = []

    async def run_step(index, _):
        if plan.steps[index].model == "bad":
            raise KeyError("bad")
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(plan.steps[index].model)

    with pytest.raises(KeyError):
        await ensemble.run(plan, {"a": 1}, run_step)
    assert set(ended) <= {"slow"}


# An ensemble on a worker, over a real store.


def edit(folder, old, new):
    config = folder.parent / "config.pbtxt"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('key: "a"', 'key: "z"', "no input 'z'"),
        ('key: "b"', 'key: "z"', "no output 'z'"),
        ('"in" data_type: TYPE_FP32', '"in" data_type: TYPE_INT8', "takes 'x' as FP32, and tensor 'in' is INT8"),
        ('name: "out" data_type: TYPE_FP32', 'name: "out" data_type: TYPE_INT8', "'out' is FP32.*says INT8"),
        ('model_name: "doubled"', 'model_name: "nobody"', "its step 'nobody' is not loaded"),
        ('model_name: "doubled"', 'model_name: "double"', "its step 'double' is not loaded; did you mean 'doubled'\\?"),
        ('model_name: "doubled"', 'model_name: "pipeline"', "is an ensemble; a step must be a model"),
    ],
)
async def test_steps_that_do_not_fit_are_named_in_the_index(tmp_path, old, new, words):
    models.mlp(tmp_path)
    edit(models.pipeline(tmp_path), old, new)
    store = await store_of(tmp_path)
    assert re.search(words, store.held.find("pipeline", "").model.runnable.reason)
    (line,) = [line for line in await store.index() if line.name == "pipeline"]
    assert re.search(words, line.reason)
    assert ("a router runs" in line.reason) == ("is not loaded" in words)
    assert line.state == UNAVAILABLE


async def test_a_graph_that_is_none_is_not_loaded(tmp_path):
    models.mlp(tmp_path)
    models.pipeline(tmp_path)
    store = await store_of(tmp_path)
    edit(tmp_path / "pipeline/1", 'value: "out"', 'value: "nowhere"')
    with pytest.raises(InvalidArgumentError, match="output 'out' is not made"):
        await store.load("pipeline")


async def test_an_ensemble_of_a_model_that_draws_is_not_cached(tmp_path):
    models.mlp(tmp_path)
    folder = models.pipeline(tmp_path)
    assert (await store_of(tmp_path)).held.find("pipeline", "").model.cacheable
    (tmp_path / "mlp/config.pbtxt").write_text("response_cache { enable: false }")
    store = await store_of(tmp_path)
    assert "step 'mlp'" in store.held.find("pipeline", "").model.cacheable.reason
    with (folder.parent / "config.pbtxt").open("a") as config:
        config.write("response_cache { enable: true }")
    assert (await store_of(tmp_path)).held.find("pipeline", "").model.cacheable


async def test_a_replaced_step_is_another_digest_of_the_ensemble(tmp_path):
    models.mlp(tmp_path, seed=0)
    models.pipeline(tmp_path)
    store = await store_of(tmp_path)
    before = store.held.find("pipeline", "").model
    await store.load("pipeline")
    assert store.held.find("pipeline", "").model.digest == before.digest
    models.mlp(tmp_path, seed=1)
    await store.load("mlp")
    assert store.held.find("pipeline", "").model.digest != before.digest
    await store.unload("mlp")
    assert "its step 'mlp' is not loaded" in store.held.find("pipeline", "").model.runnable.reason


async def test_an_ensemble_has_its_own_labels_or_those_of_the_step_that_makes_the_output(tmp_path):
    models.mlp(tmp_path)
    folder = models.pipeline(tmp_path)
    for labelled in ("doubled", "pipeline"):
        (tmp_path / labelled / "labels.txt").write_text(labelled)
    (tmp_path / "doubled/config.pbtxt").write_text('output { name: "b" label_filename: "labels.txt" }')
    store = await store_of(tmp_path)
    assert store.held.find("pipeline", "").model.labels == {"out": (b"doubled",)}
    (tmp_path / "doubled/labels.txt").write_text("new")
    await store.load("doubled")
    assert store.held.find("pipeline", "").model.labels == {"out": (b"new",)}
    edit(folder, 'name: "out"', 'name: "out" label_filename: "labels.txt"')
    await store.load("pipeline")
    assert store.held.find("pipeline", "").model.labels == {"out": (b"pipeline",)}


async def test_unloading_with_dependents_takes_the_steps_along(tmp_path):
    models.mlp(tmp_path)
    models.pipeline(tmp_path)
    store = await store_of(tmp_path)
    await store.unload("pipeline", dependents=True)
    assert [line.state for line in await store.index()] == ["UNAVAILABLE"] * 3


async def test_unloading_with_dependents_leaves_a_step_that_was_loaded_later(tmp_path):
    models.mlp(tmp_path)
    models.pipeline(tmp_path)
    store = await store_of(tmp_path)
    await store.load("mlp", decided_ns=200)
    await store.unload("pipeline", dependents=True, decided_ns=100)
    assert [line.name for line in await store.index() if line.state == "READY"] == ["mlp"]
    assert store.decisions.decided_ns["mlp"] == 200


async def test_the_router_refuses_more_rows_than_an_ensemble_says_before_it_runs_a_step():
    metadata = v2.ModelMetadataResponse(inputs=[{"name": "a", "datatype": "FP32", "shape": [-1, 1]}])
    plan = ensemble.plan(scheduling(("one", "a", "b")), "a", "b")
    model = ModelEntry("e", "1", b"d" * 16, YES, metadata, plan=plan, max_request_rows=4)
    request = v2.ModelInferRequest(raw_input_contents=[bytes(20)])
    request.inputs.add(name="a", datatype="FP32", shape=[5, 1])

    async def infer(data):
        raise AssertionError("a step ran")

    with pytest.raises(InvalidArgumentError, match=r"5 rows; ensemble 'e' takes 4 at most"):
        await ensembles.run(model, plan, request.SerializeToString(), infer)
