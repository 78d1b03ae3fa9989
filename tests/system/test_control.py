"""Managing models with the real tritonclient, on a worker and through a router."""

import asyncio
import os
import queue
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests import models as onnx_models
from tests.system import processes
from tests.system.test_cache import fresh, infer


@pytest.fixture(scope="module")
def served(engine, tmp_path_factory):
    """(repository, router, workers): a fleet on a repository that the tests here may change."""
    folder = tmp_path_factory.mktemp("repository")
    onnx_models.mlp(folder, seed=0)
    onnx_models.add_sub(folder)
    started = []

    def start(module, **settings):
        started.append(processes.start(module, engine=engine, **settings))
        return started[-1]

    with ThreadPoolExecutor() as pool:
        names = ("worker-1", "worker-2")
        workers = list(
            pool.map(lambda name: start("services.inference", worker_id=name, models=folder, threads=1), names)
        )
    yield folder, start("router", workers=",".join(worker.address for worker in workers)), workers
    processes.stop(*started)


@pytest.fixture
def repository(served):
    """The repository as it was, freshly loaded: counts begin at 0."""
    folder, router, workers = served
    shutil.rmtree(folder / "mlp")
    onnx_models.mlp(folder, seed=0)
    for process in (*workers, router):
        with triton.InferenceServerClient(process.address) as client:
            client.update_trace_settings(settings={"trace_level": "TIMESTAMPS", "trace_rate": "100"})
            client.update_log_settings({"log_info": True, "log_warning": True, "log_error": True})
    with triton.InferenceServerClient(router.address) as client:
        for name in ("mlp", "add_sub"):
            if client.is_model_ready(name):
                client.unload_model(name)
            client.load_model(name)
    return folder


@pytest.fixture
def fleet(served, repository):
    """(router, workers)"""
    return served[1:]


@pytest.fixture(params=["router", "worker"])
def client(request, fleet):
    router, workers = fleet
    with triton.InferenceServerClient(router.address if request.param == "router" else workers[0].address) as client:
        yield client


def answer(client, value=1.0, model="mlp", **options):
    tensor = triton.InferInput("x", [1, 64], "FP32")
    tensor.set_data_from_numpy(np.full((1, 64), value, np.float32))
    return client.infer(model, [tensor], **options).as_numpy("y").tolist()


def index(client):
    return {(m.name, m.version): (m.state, m.reason) for m in client.get_model_repository_index().models}


def test_a_reloaded_model_answers_with_its_new_files_at_once(client, repository):
    before = answer(client)
    assert answer(client) == before
    onnx_models.mlp(repository, seed=1)
    client.load_model("mlp")
    after = answer(client)
    assert after != before
    onnx_models.mlp(repository, seed=0)
    client.load_model("mlp")
    assert answer(client) == before


def test_a_broken_version_leaves_the_old_one_serving_and_the_index_says_why(client, repository):
    before = answer(client)
    (onnx_models.mlp(repository, version=2) / "model.onnx").write_bytes(b"broken")
    with pytest.raises(InferenceServerException, match=r"2/model\.onnx") as caught:
        client.load_model("mlp")
    assert "INVALID_ARGUMENT" in caught.value.status()
    assert answer(client) == before
    assert index(client)["mlp", "1"][0] == "READY"
    state, reason = index(client)["mlp", "2"]
    assert state == "UNAVAILABLE"
    assert "model.onnx" in reason


def test_a_model_that_failed_to_load_is_unavailable_with_the_reason_until_it_is_deleted(client, repository):
    folder = repository / "broken/1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"broken")
    for _ in range(2):
        with pytest.raises(InferenceServerException, match="failed to load 'broken'"):
            client.load_model("broken")
        with pytest.raises(InferenceServerException, match=r"model 'broken' failed to load: .*model\.onnx") as caught:
            answer(client, model="broken")
        assert "UNAVAILABLE" in caught.value.status()
        assert not client.is_model_ready("broken")
    shutil.rmtree(repository / "broken")
    assert not any(name == "broken" for name, _ in index(client))
    with pytest.raises(InferenceServerException, match="failed to load 'broken'"):
        client.load_model("broken")
    with pytest.raises(InferenceServerException, match="'broken' is not found"):
        answer(client, model="broken")


def test_an_unloaded_model_is_gone_and_comes_back(client):
    client.unload_model("mlp")
    assert not client.is_model_ready("mlp")
    with pytest.raises(InferenceServerException, match="mlp") as caught:
        answer(client)
    assert "NOT_FOUND" in caught.value.status()
    assert index(client)["mlp", "1"][0] == "UNAVAILABLE"
    client.load_model("mlp")
    assert client.is_model_ready("mlp")
    answer(client)


def test_a_model_may_be_loaded_from_the_request(client, repository, tmp_path_factory):
    elsewhere = onnx_models.mlp(tmp_path_factory.mktemp("elsewhere"), seed=5) / "model.onnx"
    before = answer(client)
    client.load_model("mlp", config='{"backend": "onnxruntime"}', files={"file:3/model.onnx": elsewhere.read_bytes()})
    assert answer(client) != before
    assert client.get_model_metadata("mlp").versions == ["3"]
    with pytest.raises(InferenceServerException, match="max_batch_sise"):
        client.load_model("mlp", config='{"max_batch_sise": 3}')


def test_the_configuration_tells_batching_caching_and_provider(client):
    config = client.get_model_config("mlp").config
    assert (config.name, config.platform, config.backend) == ("mlp", "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size > 1
    assert config.parameters["ringmesh_cached"].string_value == "yes"
    assert config.parameters["ringmesh_provider"].string_value == "CPUExecutionProvider"


def test_statistics_count_inferences_executions_and_failures(client):
    for _ in range(3):
        answer(client, value=float(np.random.default_rng().random()))
    tensor = triton.InferInput("x", [1, 64], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 64), np.float32))
    tensor._raw_content = b"four"  # what only a worker sees
    with pytest.raises(InferenceServerException, match="4 bytes"):
        client.infer("mlp", [tensor])
    (stats,) = client.get_inference_statistics("mlp", "1").model_stats
    assert (stats.inference_count, stats.execution_count) == (3, 3)
    assert stats.inference_stats.success.count >= 3
    assert stats.inference_stats.fail.count == 1
    assert stats.inference_stats.compute_infer.ns > 0
    assert sum(batch.compute_infer.count for batch in stats.batch_stats) == 3
    every = {(s.name, s.version) for s in client.get_inference_statistics().model_stats}
    assert every == {("mlp", "1"), ("add_sub", "1")}
    with pytest.raises(InferenceServerException, match="nobody"):
        client.get_inference_statistics("nobody")


def test_statistics_of_a_router_count_its_cache(fleet):
    router, _ = fleet
    with triton.InferenceServerClient(router.address) as client:
        (before,) = client.get_inference_statistics("mlp").model_stats
        for _ in range(4):
            answer(client, value=9.0)
        (stats,) = client.get_inference_statistics("mlp").model_stats
    assert (stats.inference_count, stats.execution_count) == (1, 1)
    counts, counts_before = stats.inference_stats, before.inference_stats
    assert counts.cache_hit.count - counts_before.cache_hit.count == 3
    assert counts.cache_miss.count - counts_before.cache_miss.count == 1
    assert counts.success.count - counts_before.success.count == 4
    assert counts.queue.count - counts_before.queue.count == 4


def test_trace_and_log_settings_are_read_and_changed(client):
    assert client.get_trace_settings().settings["trace_rate"].value == ["100"]
    changed = client.update_trace_settings(settings={"trace_rate": "10"}).settings
    assert changed["trace_rate"].value == ["10"]
    assert client.update_trace_settings(settings={"trace_level": ["OFF"]}).settings["trace_level"].value == ["OFF"]
    own = client.update_trace_settings("mlp", settings={"trace_rate": "7"}).settings
    assert own["trace_rate"].value == ["7"]
    assert client.get_trace_settings("mlp").settings["trace_rate"].value == ["7"]
    assert client.get_trace_settings("add_sub").settings["trace_level"].value == ["OFF"]
    assert client.get_trace_settings().settings["trace_level"].value == ["OFF"]
    cleared = client.update_trace_settings("mlp", settings={"trace_rate": None}).settings
    assert cleared["trace_level"].value == ["OFF"]
    with pytest.raises(InferenceServerException, match="nobody"):
        client.get_trace_settings("nobody")
    with pytest.raises(InferenceServerException, match="trace_colour"):
        client.update_trace_settings(settings={"trace_colour": "red"})
    assert client.get_log_settings().settings["log_info"].bool_param
    quiet = client.update_log_settings({"log_info": False, "log_warning": False}).settings
    assert (quiet["log_info"].bool_param, quiet["log_error"].bool_param) == (False, True)
    with pytest.raises(InferenceServerException, match="log_colour"):
        client.update_log_settings({"log_colour": True})


@pytest.mark.both_engines
def test_a_stream_answers_in_order_with_errors_in_their_place(client):
    answers: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(20):
        tensor = triton.InferInput("x", [1, 64], "FP32")
        tensor.set_data_from_numpy(np.full((1, 64), number % 5, np.float32))
        client.async_stream_infer(
            "nobody" if number == 7 else "mlp", [tensor], request_id=str(number), enable_empty_final_response=True
        )
    client.stop_stream()
    got = [answers.get(timeout=60) for _ in range(20)]
    result, error = got.pop(7)
    assert result is None
    assert "nobody" in str(error)
    assert [result.get_response().id for result, _ in got] == [str(n) for n in range(20) if n != 7]
    assert all(result.get_response().parameters["triton_final_response"].bool_param for result, _ in got)
    assert got[0][0].as_numpy("y").tolist() == got[5][0].as_numpy("y").tolist()


@pytest.mark.both_engines
async def test_the_asyncio_client_streams(fleet):
    router, _ = fleet

    async def requests():
        for number in range(5):
            tensor = triton_aio.InferInput("x", [1, 64], "FP32")
            tensor.set_data_from_numpy(np.full((1, 64), number, np.float32))
            yield {"model_name": "mlp", "inputs": [tensor], "request_id": str(number)}

    async with triton_aio.InferenceServerClient(router.address) as client:
        ids = [result.get_response().id async for result, error in client.stream_infer(requests()) if error is None]
    assert ids == list("01234")


@pytest.mark.both_engines
async def test_a_strict_stream_ends_with_the_status_of_the_first_error(fleet):
    router, _ = fleet
    bad = fresh()
    bad.model_name = "nobody"
    async with grpc.aio.insecure_channel(router.address) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(
            iter([fresh().SerializeToString(), bad.SerializeToString()]), metadata=(("triton_grpc_error", "true"),)
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_replacing_a_model_under_load_fails_no_request_and_serves_no_old_answer(fleet, repository):
    router, _ = fleet
    request = fresh()
    async with grpc.aio.insecure_channel(router.address) as channel:
        expected = {}
        async with triton_aio.InferenceServerClient(router.address) as client:
            for seed in (1, 2):
                onnx_models.mlp(repository, seed=seed)
                await client.load_model("mlp")
                expected[seed] = (await infer(channel, request))[0].raw_output_contents[0]
            assert expected[1] != expected[2]
            stop = asyncio.Event()
            served = 0

            async def caller():
                nonlocal served
                while not stop.is_set():
                    await infer(channel, request)
                    await infer(channel, fresh())
                    served += 2

            callers = [asyncio.create_task(caller()) for _ in range(4)]
            for turn in range(20):
                seed = 1 + turn % 2
                onnx_models.mlp(repository, seed=seed)
                await client.load_model("mlp")
                response, _ = await infer(channel, request)
                assert response.raw_output_contents[0] == expected[seed]
            stop.set()
            await asyncio.gather(*callers)
    assert served > 40


@pytest.fixture
def region():
    """(name, key, handle) of a new shared memory object of 4 KiB."""
    import tritonclient.utils.shared_memory as shm

    name = f"ringmesh_test_{uuid.uuid4().hex}"
    handle = shm.create_shared_memory_region(name, f"/{name}", 4096)
    yield name, f"/{name}", handle
    shm.destroy_shared_memory_region(handle)


def in_shared_memory(client, region, *, input_size=256, output_size=40):
    name = region[0]
    tensor = triton.InferInput("x", [1, 64], "FP32")
    tensor.set_shared_memory(name, input_size)
    output = triton.InferRequestedOutput("y")
    output.set_shared_memory(name, output_size, offset=1024)
    return client.infer("mlp", [tensor], outputs=[output])


def test_tensors_go_through_system_shared_memory(client, region):
    import tritonclient.utils.shared_memory as shm

    name, key, handle = region
    array = np.random.default_rng(1).random((1, 64), dtype=np.float32)
    shm.set_shared_memory_region(handle, [array])
    client.register_system_shared_memory(name, key, 4096)
    assert client.get_system_shared_memory_status().regions[name].byte_size == 4096
    response = in_shared_memory(client, region).get_response()
    assert list(response.raw_output_contents) == [b""]
    found = shm.get_contents_as_numpy(handle, np.float32, [1, 10], offset=1024)
    tensor = triton.InferInput("x", [1, 64], "FP32")
    tensor.set_data_from_numpy(array)
    np.testing.assert_allclose(found, client.infer("mlp", [tensor]).as_numpy("y"), rtol=1e-5)
    client.unregister_system_shared_memory(name)
    with pytest.raises(InferenceServerException, match=name):
        in_shared_memory(client, region)


def test_shared_memory_that_does_not_fit_is_refused(client, region):
    name, key, _ = region
    client.unregister_system_shared_memory()
    with pytest.raises(InferenceServerException, match="4096"):
        client.register_system_shared_memory(name, key, 8192)
    with pytest.raises(InferenceServerException, match="nowhere"):
        client.register_system_shared_memory(name, "/nowhere", 16)
    client.register_system_shared_memory(name, key, 4096)
    with pytest.raises(InferenceServerException, match="already"):
        client.register_system_shared_memory(name, key, 4096)
    with pytest.raises(InferenceServerException, match="252 bytes"):
        in_shared_memory(client, region, input_size=252)
    with pytest.raises(InferenceServerException, match="40 bytes"):
        in_shared_memory(client, region, output_size=36)
    with pytest.raises(InferenceServerException, match="4096"):
        in_shared_memory(client, region, output_size=4000)


def test_a_region_that_was_truncated_is_refused_and_serves_again_once_it_is_long_enough(client, region):
    name, key, _ = region
    client.unregister_system_shared_memory()
    client.register_system_shared_memory(name, key, 4096)
    for size in (0, 1024):
        os.truncate(f"/dev/shm{key}", size)
        with pytest.raises(InferenceServerException, match=f"no longer there: .* {size} bytes") as caught:
            in_shared_memory(client, region)
        assert "INVALID_ARGUMENT" in caught.value.status()
    os.truncate(f"/dev/shm{key}", 4096)
    in_shared_memory(client, region)


def test_cuda_shared_memory_is_unimplemented_in_clear_words(client):
    client.unregister_cuda_shared_memory()
    with pytest.raises(InferenceServerException, match="CUDA shared memory is not served") as caught:
        client.register_cuda_shared_memory("region", b"aGFuZGxl", 0, 16)
    assert "UNIMPLEMENTED" in caught.value.status()
