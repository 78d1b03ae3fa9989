"""`ringmesh demo`: the real model over real files, through real processes."""

import re
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.system.conftest import RINGMESH

REPOSITORY = Path(__file__).parents[2]
SAMPLES = ["README.md", "Makefile", "pyproject.toml", "router/main.py", "protos/ringmesh/router/v1/router.proto"]

# Many stacks, one after the other; the default run starts and stops one, in conftest.
pytestmark = pytest.mark.proof


def run(cwd, *arguments):
    return subprocess.run([*RINGMESH, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture
def project(tmp_path):
    for name in SAMPLES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    (tmp_path / "empty.txt").touch()
    return tmp_path


def test_the_second_pass_is_all_hits_and_every_request_has_a_trace(project):
    done = run(project, "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(\S+) +(\S+) +([01]\.\d\d) +(\S+) +([\d.]+) +([0-9a-f]{12}) *$", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == sorted(SAMPLES) * 2
    detected = {path: label for path, label, *_ in rows}
    assert detected["router/main.py"] == "python"
    assert detected["pyproject.toml"] == "toml"
    assert detected["Makefile"] == "makefile"
    assert {row[3] for row in rows[:5]} == {"miss"}
    assert {row[3] for row in rows[5:]} == {"hit-local"}
    assert "hit ratio           5 of 10 (50%); second pass 5 of 5" in done.stdout
    assert int(re.search(r"compute time saved +(\d+) ms", done.stdout)[1]) > 0
    assert "only hits, and each answer equals the first one byte for byte" in done.stdout
    cost = re.search(r"^cost +(\S+) USD for 10 requests; the cache saved (\S+) USD$", done.stdout, re.MULTILINE)
    assert float(cost[1]) > float(cost[2]) > 0
    assert f"classified 5 of the {len(SAMPLES) + 1} files in this folder" in done.stdout
    *_, slowest, shown, _ = done.stdout.splitlines()
    (trace_id,) = re.search(r"http://127\.0\.0\.1:\d+/traces/([0-9a-f]{12})", slowest).groups()
    assert {row[5]: float(row[4]) for row in rows}[trace_id] == max(float(row[4]) for row in rows)
    assert f"trace {trace_id}" in shown
    for row, last in ((rows[0], "onnxruntime run"), (rows[-1], "hit-local")):
        trace = run(project, "trace", row[5])
        assert trace.returncode == 0, trace.stderr
        assert last in trace.stdout
    assert not [process for process in psutil.process_iter(["environ"]) if _is_of(process, project)]


def test_a_folder_without_files_is_named(tmp_path):
    done = run(tmp_path, "demo")
    assert done.returncode == 2
    assert done.stderr == f"ringmesh: no files to classify under {tmp_path}; run the demo in another folder\n"


def _is_of(process, project):
    return str(project) in ((process.info["environ"] or {}).get("RINGMESH_TRACE_DIR") or "")
