"""The semantic tier: approximate, always marked, and only where a model asks for it."""

import subprocess
import uuid

import grpc
import numpy as np
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.oip.tensors import encode
from tests.models import texts
from tests.system.conftest import RINGMESH
from tests.system.test_cache import infer
from tests.system.test_rows import batch


def near(vector, cosine):
    """A vector of any length with this cosine."""
    other = np.random.default_rng().normal(size=vector.shape)
    other -= (other * vector).sum() / (vector * vector).sum() * vector
    unit, across = vector / np.linalg.norm(vector), other / np.linalg.norm(other)
    return ((cosine * unit + (1 - cosine**2) ** 0.5 * across) * 5).astype(np.float32)


def fresh(count=1):
    return np.random.default_rng().normal(size=(count, 64)).astype(np.float32)


async def test_a_similar_vector_is_answered_as_the_first_was_and_says_so(channel):
    vector = fresh()
    first, told = await infer(channel, batch(vector, "similar"))
    assert (told["ringmesh-cache"], "ringmesh-similarity" in told) == ("miss", False)
    second, told = await infer(channel, batch(near(vector, 0.995), "similar"))
    assert (told["ringmesh-cache"], told["ringmesh-similarity"]) == ("hit-semantic", "0.9950")
    assert second.SerializeToString() == first.SerializeToString()
    _, told = await infer(channel, batch(near(vector, 0.98), "similar"))
    assert told["ringmesh-cache"] == "miss"
    _, told = await infer(channel, batch(vector, "similar"))
    assert told["ringmesh-cache"] == "hit-local"


async def test_an_approximate_answer_is_never_filed_as_the_right_one(channel):
    vector = fresh()
    other = near(vector, 0.995)
    await infer(channel, batch(vector, "similar"))
    approximate, _ = await infer(channel, batch(other, "similar"))
    exact, told = await infer(channel, batch(other, "similar"), [("cache-control", "max-age=1000")])
    assert told["ringmesh-cache"] == "miss"
    assert exact.raw_output_contents != approximate.raw_output_contents


@pytest.mark.parametrize("change", ["outputs", "parameter", "batch", "model"])
async def test_what_asks_for_something_else_is_not_similar(channel, change):
    vector = fresh()
    await infer(channel, batch(vector, "similar"))
    request = batch(near(vector, 0.999), "similar" if change != "model" else "mlp")
    if change == "parameter":
        request.parameters["k"].int64_param = 1
    elif change == "outputs":
        request.outputs.add(name="y").parameters["classification"].int64_param = 1
    elif change == "batch":
        request = batch(np.concatenate([near(vector, 0.999)] * 2), "similar")
    assert (await infer(channel, request))[1]["ringmesh-cache"] == "miss"


def text(words, model="texts"):
    array = np.array([[word.encode() for word in words.split()]], object)
    request = v2.ModelInferRequest(model_name=model, raw_input_contents=[encode(array)])
    request.inputs.add(name="x", datatype="BYTES", shape=array.shape)
    return request


async def test_a_text_is_answered_as_one_was_whose_embedding_is_near(channel):
    unique = uuid.uuid4().hex  # no word of the embedding
    first, told = await infer(channel, text(f"to be or not to be that is the question {unique}"))
    assert told["ringmesh-cache"] == "miss"
    second, told = await infer(channel, text(f"the question is to be or not to be {unique}"))
    assert (told["ringmesh-cache"], told["ringmesh-similarity"]) == ("hit-semantic", "0.9636")  # 13 / sqrt(14 * 13)
    assert second.SerializeToString() == first.SerializeToString()
    assert (await infer(channel, text(f"not the question {unique}")))[1]["ringmesh-cache"] == "miss"
    assert (await infer(channel, text(f"nothing known {unique}")))[1]["ringmesh-cache"] == "miss"
    assert (await infer(channel, text(f"to be {unique}", model="identity_bytes")))[1]["ringmesh-cache"] == "miss"


async def test_without_its_embedding_model_a_request_is_computed_as_ever(start_worker, start_router, tmp_path):
    texts(tmp_path)
    worker = start_worker("worker", models=tmp_path)
    router = start_router([worker.address], None)
    async with grpc.aio.insecure_channel(router.address) as channel:
        for words in ("to be or not", "or not to be"):
            assert (await infer(channel, text(words)))[1]["ringmesh-cache"] == "miss"


def test_the_tool_tells_how_often_a_similar_answer_would_be_right(stack, tmp_path):
    vectors = [fresh()[0] for _ in range(10)]
    vectors += [near(vector, 0.9999) for vector in vectors]
    np.save(tmp_path / "v.npy", np.stack(vectors))
    command = [*RINGMESH, "semantic-precision", "similar", str(tmp_path / "v.npy"), "--router", stack.router]
    done = subprocess.run([*command, "--threshold", "0.99"], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "50.0%" in done.stdout
    (tmp_path / "v.npy").write_text("no vectors")
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 2
    assert "should be a .npy file" in done.stderr
    assert "Traceback" not in done.stderr
