"""Models that kill the process that serves them: the others go on, and the culprit is left out."""

import asyncio
import threading
import time

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from services.inference.repository.crash_journal import CRASHES
from tests import models as onnx_models
from tests.system import processes
from tests.system.conftest import eventually, start_stack, stop_stack
from tests.system.test_cache import fresh, infer


def index(address):
    with triton.InferenceServerClient(address) as client:
        return {(line.name, line.version): line for line in client.get_model_repository_index().models}


def is_in_quarantine(address, name):
    line = index(address).get((name, "1"))
    return line is not None and line.state == "UNAVAILABLE" and "quarantined" in line.reason


def ask(address, name, width=1):
    """On a thread of its own: whoever answers this one may be killed."""
    tensor = triton.InferInput("x", [1, width], "FP32")
    tensor.set_data_from_numpy(np.ones((1, width), np.float32))

    def call():
        try:
            with triton.InferenceServerClient(address) as client:
                client.infer(name, [tensor])
        except InferenceServerException:
            pass

    threading.Thread(target=call, daemon=True).start()


@pytest.mark.proof
def test_a_model_that_dies_at_work_again_and_again_is_quarantined_until_it_is_asked_for(start_worker, tmp_path):
    onnx_models.mlp(tmp_path / "models")
    onnx_models.slow(tmp_path / "models", trips=20_000)
    address = processes.free_address()
    settings = {"models": tmp_path / "models", "state_dir": tmp_path / "state", "address": address}
    journal = tmp_path / "state/crashes" / address
    for _ in range(CRASHES):
        worker = start_worker("worker-a", **settings)
        assert not is_in_quarantine(address, "slow")
        ask(address, "slow")
        eventually(lambda: any(journal.read_bytes()[16::32]))
        worker.process.kill()
        worker.process.wait()
    start_worker("worker-a", **settings)
    assert is_in_quarantine(address, "slow")
    with triton.InferenceServerClient(address) as client:
        assert client.is_model_ready("mlp")
        client.load_model("slow")
        assert client.is_model_ready("slow")


@pytest.mark.proof
async def test_a_model_that_crashes_its_workers_leaves_the_others_serving(engine, tmp_path):
    onnx_models.mlp(tmp_path / "models")
    stack = start_stack(
        tmp_path / "state", "--models", str(tmp_path / "models"), "--workers", "2", "--drain", "5", engine=engine
    )
    try:
        onnx_models.crashing(tmp_path / "models")
        with triton.InferenceServerClient(stack.workers[0]) as client, pytest.raises(InferenceServerException):
            client.load_model("crashing")

        def left_out():
            try:
                return is_in_quarantine(stack.workers[0], "crashing")
            except InferenceServerException:
                return False

        recovered = asyncio.create_task(asyncio.to_thread(eventually, left_out, 120))
        answered = 0
        async with grpc.aio.insecure_channel(stack.router) as channel:
            while not recovered.done():
                await infer(channel, fresh())
                answered += 1
        await recovered
        assert answered > 0
        assert stack.output.count("was ended by SIGSEGV") == CRASHES
        assert index(stack.router)["mlp", "1"].state == "READY"
        eventually(lambda: is_in_quarantine(stack.router, "crashing"))
        # Other files under the name are another model.
        path = tmp_path / "models/crashing/1/model.onnx"
        path.write_bytes((tmp_path / "models/mlp/1/model.onnx").read_bytes())
        with triton.InferenceServerClient(stack.router) as client:
            client.load_model("crashing")
            assert client.is_model_ready("crashing")
    finally:
        assert stop_stack(stack) == 0


@pytest.mark.proof
async def test_a_request_that_kills_who_runs_it_kills_two_of_a_fleet(start_worker, start_router, tmp_path):
    onnx_models.slow(tmp_path / "models", trips=20_000)
    workers = {}
    for name in ("worker-a", "worker-b", "worker-c"):
        worker = start_worker(name, models=tmp_path / "models", state_dir=tmp_path / "state")
        workers[tmp_path / "state/crashes" / worker.address] = worker
    router = start_router([worker.address for worker in workers.values()], None).address
    async with grpc.aio.insecure_channel(router) as channel:
        asked = asyncio.create_task(infer(channel, fresh("slow")))

        def kill_who_runs_it():
            """As the model would, if this were one that does."""
            while len(workers) > 1:
                for journal in list(workers):
                    if any(journal.read_bytes()[16::32]):
                        workers.pop(journal).process.kill()
                time.sleep(0.001)

        killing = asyncio.create_task(asyncio.to_thread(kill_who_runs_it))
        with pytest.raises(grpc.aio.AioRpcError, match="2 workers ended while they had it") as caught:
            await asked
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        await killing
    (left,) = workers.values()
    assert left.process.poll() is None
