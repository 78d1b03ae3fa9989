"""A model on a real GPU: `make bench-gpu` runs these. Without one, those that can run on the CPU do, as a dry run."""

import numpy as np
import onnxruntime
import pytest

from services.inference.execution import execution
from services.inference.execution.device_session import page_locked
from services.runtime.errors import InternalError
from services.runtime.telemetry.gpu_metrics import gpu_metrics
from tests import models
from tests.bench import gpu, networks
from tests.unit.inference.loaded import load as load_model

pytestmark = pytest.mark.gpu

AVAILABLE = onnxruntime.get_available_providers()


@pytest.fixture(scope="module")
def has_gpu():
    return gpu.starts_cuda()


@pytest.fixture
def needs_gpu(has_gpu):
    if not has_gpu:
        pytest.skip("CUDA does not start here")


@pytest.fixture
def first(has_gpu):
    """The provider of a model that may run anywhere."""
    return execution.CUDA if has_gpu else execution.CPU


def load(folder, config="", *, providers=AVAILABLE):
    (folder.parent / "config.pbtxt").write_text(config)
    return load_model(folder, providers)


def rows(count, seed=0):
    return {"x": np.random.default_rng(seed).random((count, 64), dtype=np.float32)}


def assert_as_on_the_cpu(model, folder, counts=(1, 3, 8, 3, 1)):
    """Up to rounding: kernels of a GPU add in another order, and by TF32."""
    reference = load(folder, "instance_group { kind: KIND_CPU }")
    for count in counts:
        (answer,), (expected,) = (one.run(rows(count, count), ["y"]) for one in (model, reference))
        np.testing.assert_allclose(answer, expected, rtol=2e-2, atol=2e-2)


def test_a_model_runs_on_the_gpu_and_says_so(tmp_path, first):
    folder = models.mlp(tmp_path)
    model = load(folder)
    assert model.provider == first
    assert_as_on_the_cpu(model, folder)


def test_a_model_for_the_cpu_stays_there(tmp_path):
    assert load(models.mlp(tmp_path), "instance_group { kind: KIND_CPU }").provider == execution.CPU


@pytest.mark.parametrize("pinned", ["true", "false"])
def test_answers_through_page_locked_memory_or_not_are_right(tmp_path, pinned):
    folder = models.mlp(tmp_path)
    assert_as_on_the_cpu(load(folder, f"optimization {{ output_pinned_memory {{ enable: {pinned} }} }}"), folder)


@pytest.mark.usefixtures("needs_gpu")
def test_there_is_page_locked_memory():
    allocate = page_locked(execution.CUDA, 0)
    assert allocate is not None
    assert allocate((2, 3), np.float32).shape() == [2, 3]


def test_recorded_kernels_answer_each_request_with_its_own_values(tmp_path, first):
    folder = models.mlp(tmp_path)
    model = load(folder, "optimization { cuda { graphs: true } }")
    assert model.provider == first
    assert_as_on_the_cpu(model, folder, counts=(2, 2, 2, 5, 2, 5))
    first, second = (model.run(rows(2, seed), ["y"])[0] for seed in (1, 2))
    assert (first != second).any()


@pytest.mark.usefixtures("needs_gpu")
def test_a_gpu_that_is_not_there_leaves_the_model_to_the_cpu(tmp_path, caplog):
    folder = models.mlp(tmp_path)
    model = load(folder, "instance_group { gpus: [ 63 ] }")
    assert model.provider == execution.CPU
    assert "without CUDAExecutionProvider" in caplog.text
    assert_as_on_the_cpu(model, folder)


@pytest.mark.usefixtures("needs_gpu")
def test_a_model_that_does_not_fit_into_the_memory_of_the_gpu_runs_on_the_cpu(tmp_path, caplog):
    networks.transformer(1, 1024, 16, 4).write(tmp_path)
    limit = 'parameters { key: "gpu_mem_limit" value { string_value: "1048576" } }'
    model = load(tmp_path / "transformer" / "1", limit)
    assert model.provider == execution.CPU
    assert "cannot start CUDAExecutionProvider" in caplog.text


@pytest.mark.usefixtures("needs_gpu")
def test_a_run_too_large_for_the_memory_of_the_gpu_fails_alone(tmp_path):
    networks.cnn(224, (64,), (1,)).write(tmp_path)
    limit = f'parameters {{ key: "gpu_mem_limit" value {{ string_value: "{256 << 20}" }} }}'
    model = load(tmp_path / "cnn" / "1", limit)
    image = np.zeros((1, 3, 224, 224), np.uint8)
    (before,) = model.run({"x": image}, ["y"])
    with pytest.raises(InternalError):
        model.run({"x": np.repeat(image, 512, axis=0)}, ["y"])
    assert model.run({"x": image}, ["y"])[0].tobytes() == before.tobytes()


@pytest.mark.usefixtures("needs_gpu")
def test_the_gpu_tells_its_load_memory_and_power():
    names = {sample.family.name for sample in gpu_metrics()()}
    assert {"ringmesh_gpu_use_ratio", "ringmesh_gpu_memory_used_bytes", "ringmesh_gpu_power_watts"} <= names


@pytest.mark.parametrize(
    "network", [networks.cnn(32, (8, 16), (1, 1)), networks.transformer(1, 32, 16, 2)], ids=["cnn", "transformer"]
)
def test_the_networks_of_the_bench_answer_rows_alike_alone_and_in_a_batch(tmp_path, network):
    network.write(tmp_path)
    model = load(tmp_path / network.name / "1")
    rng = np.random.default_rng(5)
    some = [network.row(rng) for _ in range(3)]
    (together,) = model.run({"x": np.concatenate(some)}, ["y"])
    for row, answer in zip(some, together, strict=True):
        np.testing.assert_allclose(model.run({"x": row}, ["y"])[0][0], answer, rtol=2e-2, atol=2e-2)
        assert np.isfinite(answer).all()
        assert answer.any()
