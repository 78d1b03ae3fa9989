"""Real models answer through gRPC, bit for bit, what ONNX Runtime answers in process for the same batch."""

import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as triton

from services.cli.commands import magika_features
from tests.system import processes

REAL = Path(sys.prefix) / "models"

pytestmark = pytest.mark.proof
# The inputs that the models' own packages give them: shapes and ranges, but for the pictures in them.
INPUTS = {
    "magika": ("bytes", "INT32", lambda rng, rows: rng.integers(0, 257, (rows, 2048), dtype=np.int32)),
    "rapidocr_det": ("x", "FP32", lambda rng, rows: rng.uniform(-1, 1, (rows, 3, 96, 160)).astype(np.float32)),
    "rapidocr_rec": ("x", "FP32", lambda rng, rows: rng.uniform(-1, 1, (rows, 3, 48, 320)).astype(np.float32)),
    "rapidocr_cls": ("x", "FP32", lambda rng, rows: rng.uniform(-1, 1, (rows, 3, 48, 192)).astype(np.float32)),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    if not REAL.exists():
        pytest.skip("the models are not here: make .venv/models")
    folder = tmp_path_factory.mktemp("real") / "models"
    shutil.copytree(REAL, folder)
    (folder / "magika/1").mkdir(parents=True)
    shutil.copyfile(magika_features.model_folder() / "model.onnx", folder / "magika/1/model.onnx")
    return folder


@pytest.fixture(scope="module")
def router(repository):
    worker = processes.start("services.inference", models=repository, threads=1, metrics_address="127.0.0.1:0")
    router = processes.start("router", workers=worker.address, metrics_address="127.0.0.1:0")
    yield router
    processes.stop(router, worker)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("model", INPUTS)
def test_it_answers_bit_for_bit_what_onnxruntime_answers(router, repository, model, rows):
    name, datatype, make = INPUTS[model]
    array = make(np.random.default_rng(rows), rows)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(repository / model / "1/model.onnx", options)
    expected = session.run(None, {name: array})
    with triton.InferenceServerClient(router.address) as client:
        tensor = triton.InferInput(name, array.shape, datatype)
        tensor.set_data_from_numpy(array)
        for _ in ("computed", "from the cache"):
            result = client.infer(model, [tensor])
            for output, wanted in zip(session.get_outputs(), expected, strict=True):
                answer = result.as_numpy(output.name)
                assert answer.shape == wanted.shape
                assert answer.tobytes() == wanted.tobytes()
