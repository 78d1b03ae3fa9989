"""Models are loaded from private copies: whatever happens to the repository's files meanwhile."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from onnx import TensorProto, helper

from services.inference.models.model_store import READY, ModelStore, Overrides
from services.inference.repository.repository import Directory, RepositoryError, versions
from services.inference.repository.snapshots import Snapshots
from services.runtime.errors import InvalidArgumentError, UnavailableError
from tests import models
from tests.models import value
from tests.unit.inference.loaded import EXECUTOR, open_model

SIZE = 1 << 16


def write_weights(folder, number):
    """In place, as `cp` or rsync --inplace do."""
    with (folder / "weights.bin").open("r+b" if (folder / "weights.bin").exists() else "wb") as file:
        file.write(np.full(SIZE, number, np.float32).tobytes())


def scaled(repository, number=1, name="scaled"):
    """FP32 x[n,SIZE] -> y = x * weights, which lie outside of the file."""
    x, y = value("x", TensorProto.FLOAT, "n", SIZE), value("y", TensorProto.FLOAT, "n", SIZE)
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[SIZE], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="weights.bin")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "scaled", [x], [y], [weight])
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    write_weights(folder, number)
    return folder


async def store(repository, state, **options):
    made = ModelStore(Directory(repository), open_model, EXECUTOR, snapshots=Snapshots(state), **options)
    await made.load_all()
    return made


def answer(made, name="scaled"):
    """The weights, as they are seen by a run."""
    model = made.held.find(name, "").model
    return set(model.run({"x": np.ones((1, SIZE), np.float32)}, ["y"])[0].ravel().tolist())


def files(repository, name="scaled"):
    return versions(repository, name)[0]


def content(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


async def test_weights_that_are_overwritten_in_place_are_served_under_another_digest_when_they_are_loaded(tmp_path):
    folder = scaled(tmp_path / "repository", 1)
    made = await store(tmp_path / "repository", tmp_path / "state")
    digest = made.held.find("scaled", "").model.digest
    write_weights(folder, 2)
    assert answer(made) == {1.0}
    await made.load("scaled")
    assert answer(made) == {2.0}
    assert made.held.find("scaled", "").model.digest != digest
    write_weights(folder, 1)
    assert answer(made) == {2.0}
    await made.load("scaled")
    assert (answer(made), made.held.find("scaled", "").model.digest) == ({1.0}, digest)


async def test_weights_that_are_truncated_leave_the_loaded_model_serving(tmp_path):
    folder = scaled(tmp_path / "repository", 3)
    made = await store(tmp_path / "repository", tmp_path / "state")
    os.truncate(folder / "weights.bin", 0)
    assert answer(made) == {3.0}
    with pytest.raises(InvalidArgumentError, match="repository/scaled/1"):
        await made.load("scaled")
    assert answer(made) == {3.0}


async def test_a_model_unloaded_for_room_comes_back_as_the_one_that_its_digest_names(tmp_path):
    folder = scaled(tmp_path / "repository", 1)
    models.mlp(tmp_path / "repository")
    made = await store(
        tmp_path / "repository", tmp_path / "state", memory_limit=SIZE * 4 + 10_000, process_memory=lambda: 0
    )
    first, second = made.held.find("scaled", ""), made.held.find("mlp", "")
    await second.resident.budget.load(second.resident)
    assert not first.loaded
    write_weights(folder, 2)
    await first.resident.budget.load(first.resident)
    assert first.loaded
    assert answer(made) == {1.0}


def test_files_that_change_between_hash_and_copy_are_refused(tmp_path):
    folder = scaled(tmp_path / "repository")
    hashed = files(tmp_path / "repository").hashed()
    write_weights(folder, 2)
    with pytest.raises(RepositoryError, match=r"scaled/1: its files changed meanwhile"):
        Snapshots(tmp_path / "state").take(hashed)
    assert content(tmp_path / "state") == []


def test_a_snapshot_is_shared_and_goes_with_the_last_that_uses_it(tmp_path):
    scaled(tmp_path / "one", name="scaled")
    scaled(tmp_path / "two", name="copied")
    workers = [Snapshots(tmp_path / "state") for _ in range(2)]
    first = workers[0].take(files(tmp_path / "one").hashed())
    inode = first.files.model.stat().st_ino
    second = workers[1].take(files(tmp_path / "two", "copied").hashed())
    assert second.files.model.stat().st_ino == inode
    first.close()
    workers[0].sweep()
    assert second.files.model.stat().st_ino == inode
    second.close()
    assert content(tmp_path / "state") == []


def test_workers_that_need_one_snapshot_at_once_all_get_it(tmp_path):
    scaled(tmp_path / "models")
    begin = threading.Barrier(8)

    def take(snapshots):
        begin.wait(20)
        return snapshots.take(files(tmp_path / "models").hashed())

    with ThreadPoolExecutor(8) as pool:
        for number in range(20):
            state = [Snapshots(tmp_path / str(number))] * 8
            taken = [future.result(20) for future in [pool.submit(take, one) for one in state]]
            assert {each.folder for each in taken} == {taken[0].folder}
            # Each goes on using it: who comes late must not wait for that.
            for each in taken:
                each.close()


def test_what_a_killed_worker_left_is_removed_and_what_another_uses_is_kept(tmp_path):
    scaled(tmp_path / "repository", name="kept")
    scaled(tmp_path / "repository", 2, name="left")
    code = f"""
import os, sys, pathlib
from services.inference.repository.repository import versions
from services.inference.repository.snapshots import Snapshots
snapshots = Snapshots(pathlib.Path({str(tmp_path / "state")!r}))
taken = [snapshots.take(versions(pathlib.Path({str(tmp_path / "repository")!r}), name)[0].hashed())
         for name in ("kept", "left")]
(snapshots.scratch().folder / "file").write_bytes(b"of a load request")
os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    snapshots = Snapshots(tmp_path / "state")
    kept = snapshots.take(files(tmp_path / "repository", "kept").hashed())
    snapshots.sweep()
    assert content(tmp_path / "state") == [
        f"{kept.folder.name}/files/version/{name}" for name in ("model.onnx", "weights.bin")
    ]


def test_a_damaged_snapshot_is_made_again(tmp_path):
    scaled(tmp_path / "repository", 5)
    hashed = files(tmp_path / "repository").hashed()
    entry = tmp_path / "state" / hashed.content.hex() / "files/version"
    entry.mkdir(parents=True)
    (entry / "model.onnx").write_bytes(b"")
    taken = Snapshots(tmp_path / "state").take(hashed)
    assert taken.files.hashed().content == hashed.content


async def test_a_full_disk_is_told_and_the_old_version_goes_on(tmp_path):
    folder = scaled(tmp_path / "repository", 1)
    made = await store(tmp_path / "repository", tmp_path / "state")
    write_weights(folder, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, limits[1]))
    try:
        with pytest.raises(UnavailableError, match=f"cannot copy .*scaled/1 to {tmp_path}/state.*File too large"):
            await made.load("scaled")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert answer(made) == {1.0}
    assert len([*(tmp_path / "state").iterdir()]) == 1
    await made.load("scaled")
    assert answer(made) == {2.0}


async def test_a_version_may_be_a_link_and_hold_links_of_its_own_folder(tmp_path):
    folder = scaled(tmp_path / "elsewhere", 4)
    (folder / "..data").mkdir()
    for name in ("model.onnx", "weights.bin"):
        (folder / name).rename(folder / "..data" / name)
        (folder / name).symlink_to(f"..data/{name}")
    (tmp_path / "repository/scaled").mkdir(parents=True)
    (tmp_path / "repository/scaled/1").symlink_to(folder)
    assert answer(await store(tmp_path / "repository", tmp_path / "state")) == {4.0}


async def test_a_model_file_may_be_a_link_to_anywhere(tmp_path):
    (tmp_path / "repository/linked/1").mkdir(parents=True)
    source = models.mlp(tmp_path / "elsewhere") / "model.onnx"
    (tmp_path / "repository/linked/1/model.onnx").symlink_to(source)
    made = await store(tmp_path / "repository", tmp_path / "state")
    assert [line.state for line in await made.index()] == [READY]


def test_what_is_no_file_of_the_version_is_not_in_its_snapshot(tmp_path):
    folder = scaled(tmp_path / "repository")
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "nowhere").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe")
    (tmp_path / "repository/scaled/warmup").mkdir()
    (tmp_path / "repository/scaled/warmup/x").write_bytes(b"x")
    taken = Snapshots(tmp_path / "state").take(files(tmp_path / "repository").hashed())
    assert content(taken.folder / "files") == ["version/model.onnx", "version/weights.bin", "warmup/x"]


@pytest.mark.parametrize("name", ["../2/model.onnx", "/etc/hostname", "..", ".", "a\0b", "x/model.onnx", "x" * 256])
def test_a_model_file_is_one_of_the_version_s_folder(tmp_path, name):
    scaled(tmp_path)
    escaped = "".join(f"\\{ord(character):03o}" for character in name)
    (tmp_path / "scaled/config.pbtxt").write_text(f'default_model_filename: "{escaped}"')
    with pytest.raises(RepositoryError, match="it names a file of the version's folder"):
        versions(tmp_path, "scaled")


async def test_warm_up_data_is_a_file_of_the_warmup_folder(tmp_path):
    models.add_sub(tmp_path / "repository")
    models.mlp(tmp_path / "repository")
    (tmp_path / "repository/mlp/warmup").mkdir()
    (tmp_path / "secret").write_bytes(np.zeros(64, np.float32).tobytes())
    sample = 'inputs { key: "x" value { data_type: TYPE_FP32 dims: [64] input_data_file: "../../../secret" } }'
    (tmp_path / "repository/mlp/config.pbtxt").write_text(f'max_batch_size: 8 model_warmup {{ name: "w" {sample} }}')
    made = await store(tmp_path / "repository", tmp_path / "state")
    (line,) = [line for line in await made.index() if line.name == "mlp"]
    assert "should be a file of the folder warmup" in line.reason


async def test_the_files_of_a_load_request_go_when_they_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "state"))
    (tmp_path / "state").mkdir()
    models.mlp(tmp_path / "repository", seed=0)
    made = await store(tmp_path / "repository", tmp_path / "state/snapshots")
    for seed in range(1, 6):
        data = (models.mlp(tmp_path / "elsewhere", seed=seed) / "model.onnx").read_bytes()
        await made.load("mlp", Overrides(config='{"backend": "onnxruntime"}', files={"7/model.onnx": data}))
    kept = [
        path.name for path in (tmp_path / "state").rglob("*") if path.is_file() and path.stat().st_size >= len(data)
    ]
    # In the snapshot, and in the decision, which outlives the process.
    assert len(kept) == 2
    await made.close()
    assert content(tmp_path / "state") == []
