"""`ringmesh check` on a repository with good, broken and crashing models."""

import json
import subprocess

import pytest
from typer.testing import CliRunner

from services.cli.main import app
from tests import models as onnx_models
from tests import triton_models
from tests.system.conftest import start_stack, stop_stack


def run(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The exit code, and the models by name."""
    repository = tmp_path_factory.mktemp("repository")
    onnx_models.mlp(repository)
    onnx_models.random(repository)
    onnx_models.crashing(repository)
    triton_models.build(repository)
    (repository / "mlp" / "latest").mkdir()
    (repository / "broken" / "1").mkdir(parents=True)
    (repository / "broken" / "1" / "model.onnx").write_bytes(b"no model")
    (repository / "README.md").touch()
    done = run(repository, "--json")
    return done.exit_code, {model["name"]: model for model in json.loads(done.stdout)["models"]}


def test_the_exit_code_is_1_if_a_model_fails(report):
    code, models = report
    assert code == 1
    assert {name for name, model in models.items() if model["error"]} == {"broken", "crashing"}
    assert "it is no ONNX model" in models["broken"]["error"]


def test_a_model_that_crashes_is_reported_and_the_others_are_checked(report):
    _, models = report
    assert models["crashing"]["error"] == "it ended the process that loaded it, by SIGSEGV"
    assert "simple" in models
    assert "README.md" not in models


def test_a_model_is_described(report):
    _, models = report
    described = models["simple_dyna_sequence"]
    assert described["inputs"] == [{"name": "INPUT", "datatype": "INT32", "shape": [-1, 1], "optional": False}]
    assert [output["name"] for output in described["outputs"]] == ["OUTPUT"]
    assert described["versions"] == [1]
    assert "max_batch_size" in described["fields_used"]
    assert "parameters.execute_delay_ms" in described["fields_ignored"]
    assert described["batching"] == "batched: rows are proven independent"
    assert described["provider"] == "CPUExecutionProvider"
    assert described["memory_bytes"] > 0


def test_what_a_worker_would_warn_of_is_reported_once(report):
    _, models = report
    (warning,) = models["mlp"]["warnings"]
    assert warning.startswith("model mlp: the folder latest is ignored: a version is a whole number")
    assert models["simple_dyna_sequence"]["warnings"] == []


def test_a_model_that_is_not_cached_has_a_reason(report):
    _, models = report
    assert models["mlp"]["cached"]
    assert "Random" in models["random"]["not_cached_because"]


def test_an_ensemble_is_checked_with_its_steps(report):
    _, models = report
    assert models["image_ensemble"]["error"] == ""
    assert [each["name"] for each in models["image_ensemble"]["outputs"]] == ["CLASSES"]


def test_text_shows_each_model_and_the_exit_code_is_0(tmp_path):
    onnx_models.mlp(tmp_path)
    done = run(tmp_path)
    assert done.exit_code == 0
    for words in ("mlp: ok", "x FP32 [-1, 64]", "grpcurl", "tritonclient", "1 of 1 models can be served"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("repository", "reason"),
    [("nowhere", "no model repository at "), ("ftp://x", "URL of s3"), ("", "no model in ")],
)
def test_the_exit_code_is_2_if_the_repository_cannot_be_read(tmp_path, monkeypatch, repository, reason):
    monkeypatch.chdir(tmp_path)
    done = run(repository or tmp_path)
    assert done.exit_code == 2
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.proof
def test_the_sample_requests_are_answered(tmp_path):
    repository = tmp_path / "models"
    onnx_models.mlp(repository)
    triton_models.build(repository)
    models = json.loads(run(repository, "--json").stdout)["models"]
    stack = start_stack(tmp_path / "state", "--models", str(repository), "--workers", "1")
    for model in models:
        for command in model["sample"].values():
            command = command.replace("127.0.0.1:8001", stack.router)
            done = subprocess.run(
                command, shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=180
            )
            assert done.returncode == 0, command + done.stderr
            assert model["outputs"][0]["name"] in done.stdout
    assert stop_stack(stack) == 0
