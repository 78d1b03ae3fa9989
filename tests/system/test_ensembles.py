"""Ensembles as tritonclient calls them: on one worker, through the router, and with their steps on two workers."""

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc as v2_grpc

from services.runtime.telemetry.worker_spans import EXECUTE
from services.runtime.w3c import new_span_id
from tests import models as make
from tests.system import processes
from tests.system.conftest import eventually
from tests.system.test_tracing import MODEL_INFER, so_many

X = np.random.default_rng(0).random((3, 64), np.float32)


def infer(client, model, name, array, **options):
    tensor = triton.InferInput(name, list(array.shape), "FP32")
    tensor.set_data_from_numpy(array)
    return client.infer(model, [tensor], **options)


def hits_and_misses(client, model):
    stats = client.get_inference_statistics(model).model_stats[0].inference_stats
    return stats.cache_hit.count, stats.cache_miss.count


def states(client):
    return {line.name: (line.state, line.reason) for line in client.get_model_repository_index().models}


def test_an_ensemble_answers_as_its_steps_do_one_after_the_other(client):
    between = infer(client, "mlp", "x", X).as_numpy("y")
    expected = infer(client, "doubled", "a", between).as_numpy("b")
    assert infer(client, "pipeline", "in", X).as_numpy("out").tobytes() == expected.tobytes()
    metadata = client.get_model_metadata("pipeline")
    assert (metadata.platform, list(metadata.inputs[0].shape)) == ("ensemble", [-1, 64])
    assert client.is_model_ready("pipeline")


def test_what_a_step_refuses_is_told_with_its_name(client):
    with pytest.raises(triton.InferenceServerException, match="64"):
        infer(client, "pipeline", "in", np.ones((1, 63), np.float32))


@pytest.fixture(scope="module")
def split(tmp_path_factory, models, engine):
    """Clients of a router over two workers, each with the ensemble and one of its steps, and of one of them; spans."""
    folder = tmp_path_factory.mktemp("split")
    held = ("mlp", "doubled")
    for one in held:
        for name in ("pipeline", one):
            shutil.copytree(models / name, folder / one / name)

    def start(one):
        return processes.start(
            "services.inference", worker_id=f"holds-{one}", models=folder / one, threads=1, engine=engine
        )

    with ThreadPoolExecutor() as pool:
        workers = list(pool.map(start, held))
    addresses = [worker.address for worker in workers]
    traces = {"trace_dir": folder / "traces", "trace_ratio": 1}
    router = processes.start("router", workers=",".join(addresses), engine=engine, **traces)
    with triton.InferenceServerClient(router.address) as client, triton.InferenceServerClient(addresses[0]) as worker:
        eventually(lambda: client.is_model_ready("doubled") and client.is_model_ready("mlp"))
        yield client, worker, folder / "traces"
    processes.stop(router, *workers)


def test_steps_on_two_workers_run_through_the_router(split):
    client, worker, _ = split
    x = np.random.default_rng().random((3, 64), np.float32)
    between = infer(client, "mlp", "x", x).as_numpy("y")
    hits, misses = hits_and_misses(client, "mlp")
    answer = infer(client, "pipeline", "in", x).as_numpy("out")
    assert answer.tobytes() == (between + between).tobytes()
    # The step was asked for before, and is found in the cache; then the whole is.
    assert hits_and_misses(client, "mlp") == (hits + 1, misses)
    infer(client, "pipeline", "in", x)
    assert hits_and_misses(client, "mlp") == (hits + 1, misses)
    assert client.is_model_ready("pipeline")
    with pytest.raises(triton.InferenceServerException, match="its step 'doubled' is not loaded") as caught:
        infer(worker, "pipeline", "in", x)
    assert caught.value.status() == "StatusCode.FAILED_PRECONDITION"
    assert not worker.is_model_ready("pipeline")
    # On the worker it cannot run; in the fleet it can, with or without `ready`.
    assert "its step 'doubled' is not loaded" in states(worker)["pipeline"][1]
    assert states(worker)["pipeline"][0] == "UNAVAILABLE"
    assert states(client)["pipeline"][0] == "READY"


def test_steps_on_two_workers_stand_in_one_trace_each_with_its_attempt(split):
    client, _, traces = split
    trace_id = new_span_id() * 2
    x = np.random.default_rng().random((3, 64), np.float32)
    infer(client, "pipeline", "in", x, headers={"traceparent": f"00-{trace_id}-{new_span_id()}-01"})

    # Each attempt has a span on the router and one on the worker.
    counts = {MODEL_INFER: 1, "ensemble step": 2, EXECUTE: 4, "onnxruntime run": 2}
    found = asyncio.run(so_many(traces, trace_id, counts))
    steps = {span["span_id"]: span for span in found if span["name"] == "ensemble step"}
    assert [step["attributes"]["ringmesh.model.name"] for step in steps.values()] == ["mlp", "doubled"]
    attempts = [span for span in found if span["name"].endswith("/Execute") and span["kind"] == "client"]
    told = {steps[a["parent_id"]]["attributes"]["ringmesh.model.name"]: a["attributes"] for a in attempts}
    assert {name: one["ringmesh.worker.id"] for name, one in told.items()} == {
        "mlp": "holds-mlp",
        "doubled": "holds-doubled",
    }
    (root,) = [span for span in found if span["name"].endswith("ModelInfer")]
    assert {step["parent_id"] for step in steps.values()} == {root["span_id"]}


def test_bad_input_is_told_where_steps_are_on_two_workers(split):
    client, _, _ = split
    with pytest.raises(triton.InferenceServerException, match="64") as caught:
        infer(client, "pipeline", "in", np.ones((1, 63), np.float32))
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(triton.InferenceServerException, match="has no input 'x'"):
        infer(client, "pipeline", "x", X)


def test_an_ensemble_that_can_never_run_is_not_ready_and_says_why(tmp_path, start_worker, start_router):
    make.mlp(tmp_path)
    config = make.pipeline(tmp_path).parent / "config.pbtxt"
    for name, step in (("nested", "pipeline"), ("lacking", "nobody")):
        text = config.read_text().replace(
            'model_name: "mlp" input_map { key: "x"', f'model_name: "{step}" input_map {{ key: "in"'
        )
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "config.pbtxt").write_text(text)
    worker = start_worker("one", models=tmp_path)
    router = start_router([worker.address], None)
    reasons = {"nested": "step 'pipeline' is an ensemble; a step must be a model", "lacking": "'nobody'"}
    for address in (worker.address, router.address):
        with triton.InferenceServerClient(address) as client:
            assert client.is_model_ready("pipeline")
            for name, reason in reasons.items():
                assert not client.is_model_ready(name)
                assert states(client)[name][0] == "UNAVAILABLE"
                assert reason in states(client)[name][1]
                with pytest.raises(triton.InferenceServerException, match=reason) as caught:
                    infer(client, name, "in", X)
                assert caught.value.status() == "StatusCode.FAILED_PRECONDITION"


def test_steps_are_cached_by_themselves_where_the_ensemble_asks_for_it(tmp_path, start_worker, start_router):
    make.mlp(tmp_path)
    make.pipeline(tmp_path, parameters='parameters { key: "ringmesh_cache_steps" value { string_value: "true" } }')
    router = start_router([start_worker("one", models=tmp_path).address], None)
    with triton.InferenceServerClient(router.address) as client:
        infer(client, "mlp", "x", X)
        infer(client, "pipeline", "in", X)
        assert hits_and_misses(client, "mlp") == (1, 1)


def test_a_step_that_is_replaced_changes_what_the_ensemble_answers(tmp_path, start_worker, start_router):
    make.mlp(tmp_path, seed=0)
    make.pipeline(tmp_path)
    router = start_router([start_worker("one", models=tmp_path).address], None)
    with triton.InferenceServerClient(router.address) as client:
        before = infer(client, "pipeline", "in", X).as_numpy("out")
        make.mlp(tmp_path, seed=1)
        client.load_model("mlp")
        after = infer(client, "pipeline", "in", X).as_numpy("out")
        between = infer(client, "mlp", "x", X).as_numpy("y")
        assert after.tobytes() == (between + between).tobytes() != before.tobytes()
        client.unload_model("pipeline", unload_dependents=True)
        assert not any(client.is_model_ready(name) for name in ("pipeline", "mlp", "doubled"))


def test_an_unload_with_a_parameter_of_another_type_is_refused(tmp_path, start_worker):
    make.mlp(tmp_path)
    worker = start_worker("one", models=tmp_path)
    asked = v2.RepositoryModelUnloadRequest(model_name="mlp")
    asked.parameters["unload_dependents"].string_param = "true"
    with grpc.insecure_channel(worker.address) as channel:
        stub = v2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError, match="unload_dependents must be true or false") as caught:
            stub.RepositoryModelUnload(asked, timeout=120)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
