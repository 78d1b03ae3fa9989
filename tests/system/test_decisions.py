"""What is loaded and unloaded by request holds for the fleet: after restarts, and for workers that come later."""

import contextlib
import tempfile
from pathlib import Path

import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tests import models as onnx_models
from tests.system import processes
from tests.system.conftest import eventually


@pytest.fixture
def repository(tmp_path):
    onnx_models.mlp(tmp_path / "repository", seed=0)
    onnx_models.add_sub(tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def start(engine, repository, tmp_path):
    """start(name, address) -> a worker with a state folder of its own; or a router of `workers`."""
    started = []

    def start(name, address=None, **settings):
        module = "router" if "workers" in settings else "services.inference"
        if module != "router":
            settings |= {"worker_id": name, "models": repository, "threads": 1, "state_dir": tmp_path / name}
        made = processes.start(module, engine=engine, address=address or processes.free_address(), **settings)
        started.append(made)
        return made

    yield start
    processes.kill(*started)


@contextlib.contextmanager
def client(process):
    with triton.InferenceServerClient(process.address) as made:
        yield made


def served(process):
    """(names of models that are READY, the largest batch of mlp)"""
    with client(process) as asked:
        ready = {line.name for line in asked.get_model_repository_index().models if line.state == "READY"}
        return ready, asked.get_model_config("mlp").config.max_batch_size if "mlp" in ready else 0


@pytest.mark.parametrize("end", [processes.stop, processes.kill], ids=["SIGTERM", "SIGKILL"])
def test_a_worker_that_is_started_again_serves_what_was_decided(start, end):
    worker = start("w")
    with client(worker) as asked:
        asked.unload_model("add_sub")
        asked.load_model("mlp", config='{"max_batch_size": 3}')
    end(worker)
    assert served(start("w", worker.address)) == ({"mlp"}, 3)


def test_workers_that_were_away_or_are_new_follow_the_fleet(start):
    addresses = [processes.free_address() for _ in range(3)]
    first, away = start("a", addresses[0]), start("b", addresses[1])
    router = start("r", workers=",".join(addresses))
    eventually(lambda: served(router)[0] == {"mlp", "add_sub"})
    processes.kill(away)
    with client(router) as asked:
        eventually(lambda: changed(lambda: asked.unload_model("add_sub")))
        asked.load_model("mlp", config='{"max_batch_size": 3}')
        with pytest.raises(InferenceServerException, match="nobody"):
            asked.unload_model("nobody")
    for name, address in (("b", addresses[1]), ("c", addresses[2])):
        worker = start(name, address)
        eventually(lambda one=worker: served(one) == ({"mlp"}, 3))
    assert served(first) == ({"mlp"}, 3)
    processes.kill(first)
    assert served(start("a", addresses[0])) == ({"mlp"}, 3)


def changed(change):
    """Whether all workers could be asked: one that has just died is still asked for a moment."""
    try:
        change()
    except InferenceServerException as error:
        return "not loaded" in error.message()
    return True


def test_what_is_decided_on_one_worker_stays_there_until_the_fleet_decides(start):
    workers = [start(name) for name in ("a", "b")]
    router = start("r", workers=",".join(worker.address for worker in workers))
    eventually(lambda: served(router)[0] == {"mlp", "add_sub"})
    with client(workers[0]) as asked:
        asked.unload_model("add_sub")
        asked.load_model("mlp", config='{"max_batch_size": 3}')
    with client(router) as asked:
        asked.load_model("mlp", config='{"max_batch_size": 5}')
    assert [served(worker) for worker in workers] == [({"mlp"}, 5), ({"mlp", "add_sub"}, 5)]


@pytest.fixture
def temporary(monkeypatch):
    """The temporary folder of what is started; with a short path, as sockets need it."""
    with tempfile.TemporaryDirectory(prefix="rm") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield folder


def test_the_files_of_load_requests_do_not_pile_up_on_the_disk(start, tmp_path, temporary):
    worker = start("w")

    def load(seed):
        data = (onnx_models.mlp(tmp_path / "elsewhere", seed=seed) / "model.onnx").read_bytes()
        with client(worker) as asked:
            asked.load_model("mlp", config='{"backend": "onnxruntime"}', files={"file:7/model.onnx": data})
        return len(data)

    def copies(size):
        paths = [path for folder in (temporary, tmp_path / "w") for path in Path(folder).rglob("model.onnx")]
        return sum(path.stat().st_size == size for path in paths)

    for seed in range(1, 7):
        size = load(seed)
    assert copies(size) == 1
    processes.kill(worker)
    worker = start("w", worker.address)
    load(7)
    assert copies(size) == 1
