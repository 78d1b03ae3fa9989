import asyncio
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from services.inference.codec.request import Decoded
from services.inference.models.model_store import READY, UNAVAILABLE, ModelStore
from services.inference.repository import crash_journal
from services.inference.repository.crash_journal import CRASHES, WINDOW_SECONDS, CrashJournal
from services.inference.repository.repository import Directory, versions
from services.inference.scheduling.batcher import Batcher
from services.runtime.verdict import Verdict
from tests import models
from tests.unit.inference.loaded import EXECUTOR, open_model

# When all of it happens, by the clock of the journals.
NOW = 1_000_000_000.0
BATCHED = "batched: rows are proven independent"
A, B, C = (bytes([number]) * 16 for number in (1, 2, 3))

DIE = """
import os, pathlib, signal, sys
from services.inference.repository.crash_journal import CrashJournal
journal = CrashJournal(pathlib.Path(sys.argv[1]), lambda: float(sys.argv[3]))
for digest in sys.argv[4:]:
    journal.watch(bytes.fromhex(digest)).__enter__()
os.kill(os.getpid(), int(sys.argv[2]))
"""


def die(path, *at_work, signal=9):
    """A worker that is killed while these models are at work."""
    command = [sys.executable, "-c", DIE, path, str(signal), str(NOW), *(digest.hex() for digest in at_work)]
    assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=120).returncode == -signal


def look(path, now=NOW):
    """What the next worker finds: who is in quarantine, and who runs alone."""
    journal = CrashJournal(path, lambda: now)
    quarantined = {digest for digest in (A, B, C) if not journal.allows(digest)}
    suspects = {digest for digest in (A, B, C) if journal.watch(digest).suspect}
    journal.close()
    return quarantined, suspects


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state/crashes"


@pytest.mark.parametrize("signal", [9, 11], ids=["SIGKILL", "SIGSEGV"])
def test_a_model_that_kills_its_worker_again_and_again_is_quarantined(path, signal):
    for crash in range(1, CRASHES + 1):
        die(path, A, signal=signal)
        assert look(path) == ({A} if crash == CRASHES else set(), {A})


def test_who_may_have_done_it_runs_alone_until_it_is_known(path):
    die(path, A, B)
    assert look(path) == (set(), {A, B})
    for _ in range(CRASHES):
        die(path, A)
    assert look(path) == ({A}, {A})


def test_a_suspect_is_blamed_before_those_beside_it(path):
    die(path, A)
    for _ in range(CRASHES - 1):
        die(path, A, B, C)
    assert look(path) == ({A}, {A})


def test_a_worker_that_dies_idle_or_ends_blames_nobody(path):
    journal = CrashJournal(path, lambda: NOW)
    with journal.watch(A):
        pass
    journal.close()
    assert not path.exists()
    for _ in range(CRASHES):
        die(path)
    assert look(path) == (set(), set())


def test_crashes_far_apart_are_not_counted_together_but_a_quarantine_stays(path):
    for _ in range(CRASHES - 1):
        die(path, A)
    assert look(path) == (set(), {A})
    later = NOW + WINDOW_SECONDS + 1
    assert look(path, later) == (set(), set())
    for _ in range(CRASHES):
        die(path, A)
    assert look(path)[0] == {A}
    assert look(path, later)[0] == {A}


def test_a_pardoned_model_has_all_its_chances_again(path):
    for _ in range(CRASHES):
        die(path, A)
    journal = CrashJournal(path, lambda: NOW)
    journal.pardon(A)
    assert journal.allows(A)
    journal.close()
    die(path, A)
    assert look(path)[0] == set()


def test_a_journal_is_of_one_worker(path):
    journal = CrashJournal(path, lambda: NOW)
    with pytest.raises(OSError, match="unavailable"):
        CrashJournal(path, lambda: NOW)
    journal.close()


@pytest.mark.parametrize("byte", [0xFF, 0x7F, 0x41])
def test_a_damaged_journal_blames_nobody_and_goes_on(path, byte):
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes([byte]) * 100_000)
    assert look(path) == (set(), set())
    for _ in range(CRASHES):
        die(path, A)
    assert look(path)[0] == {A}


def test_a_journal_that_the_disk_has_no_room_for_is_refused_before_it_is_mapped(path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            CrashJournal(path, lambda: NOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal = CrashJournal(path, lambda: NOW)
    assert path.stat().st_blocks * 512 >= path.stat().st_size
    journal.close()


def test_models_of_many_loads_share_the_room_and_never_a_record(path, monkeypatch):
    monkeypatch.setattr(crash_journal, "_RECORDS", 8)
    journal = CrashJournal(path, lambda: NOW)
    watches = [journal.watch(number.to_bytes(16, "big")) for number in range(1, 12)]
    marks = {watch._at for watch in watches if watch._journal is not None}
    assert len(marks) == 8
    with watches[0], watches[-1]:
        pass
    journal.close()


class Model:
    """Counts how many run at once."""

    name, batchable, max_batch_rows = "model", Verdict("one by one"), 1
    running = most = 0
    lock = threading.Lock()

    def run(self, inputs, outputs):
        with Model.lock:
            Model.running += 1
            Model.most = max(Model.most, Model.running)
        time.sleep(0.01)
        with Model.lock:
            Model.running -= 1
        return [inputs["x"]]


async def test_suspects_run_one_at_a_time_and_others_do_not(path):
    die(path, A, B)
    journal = CrashJournal(path, lambda: NOW)
    with ThreadPoolExecutor(8) as pool:

        async def most(digests):
            Model.most = 0
            batchers = [Batcher(Model(), pool, instances=2, watch=journal.watch(digest)) for digest in digests]
            decoded = Decoded({"x": np.zeros((1, 1), np.float32)}, 1, ("y",), {}, {}, ())
            await asyncio.gather(*(batcher.submit(decoded, None) for batcher in batchers for _ in range(6)))
            return Model.most

        assert await most([A, B]) == 1
        assert await most([C, bytes(15) + b"\x09"]) > 1
    journal.close()


async def states(made):
    return {line.name: (line.state, line.reason) for line in await made.index()}


async def test_a_quarantined_model_is_left_out_with_its_reason_until_it_is_asked_for_or_changes(tmp_path, path):
    repository = tmp_path / "repository"
    models.mlp(repository)
    models.add_sub(repository)
    digests = {name: versions(repository, name)[0].digest("") for name in ("mlp", "add_sub")}
    for _ in range(CRASHES):
        die(path, digests["mlp"])
    journal = CrashJournal(path, lambda: NOW)
    made = ModelStore(Directory(repository), open_model, EXECUTOR, journal=journal)
    await made.load_all()
    found = await states(made)
    assert found["add_sub"] == (READY, BATCHED)
    assert found["mlp"][0] == UNAVAILABLE
    assert f"quarantined: this worker died {CRASHES} times" in found["mlp"][1]
    models.mlp(repository, seed=5)
    await made.load("mlp")
    assert (await states(made))["mlp"] == (READY, BATCHED)
    models.mlp(repository, seed=0)
    await made.load("mlp", pardon=True)
    assert (await states(made))["mlp"] == (READY, BATCHED)
    journal.close()


async def test_a_worker_whose_only_model_is_quarantined_starts_so_that_it_can_be_let_out(tmp_path, path):
    repository = tmp_path / "repository"
    models.mlp(repository)
    for _ in range(CRASHES):
        die(path, versions(repository, "mlp")[0].digest(""))
    journal = CrashJournal(path, lambda: NOW)
    made = ModelStore(Directory(repository), open_model, EXECUTOR, journal=journal)
    await made.load_all()
    assert (await states(made))["mlp"][0] == UNAVAILABLE
    journal.close()
