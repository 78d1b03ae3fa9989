"""Triton's own load generator, unmodified, in every mode; it prints our cache hits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "perf_analyzer"

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(not FOLDER.exists(), reason="perf_analyzer is not here: make .venv/perf_analyzer"),
]


def analyze(address, *mode):
    done = subprocess.run(
        [FOLDER / "perf_analyzer", "-m", "mlp", "-u", address, "-i", "grpc", "--concurrency-range", "4",
         "--measurement-mode", "count_windows", "--measurement-request-count", "50",
         "--max-trials", "4", "--stability-percentage", "900", *mode],
        capture_output=True, text=True, timeout=300, env={**os.environ, "LD_LIBRARY_PATH": str(FOLDER)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {name.strip(): int(count) for name, count in re.findall(r"^\s+([\w ]+ count): (\d+)$", done.stdout, re.M)}


@pytest.mark.parametrize("mode", [[], ["-a"], ["-a", "--streaming"]], ids=["unary", "async", "streaming"])
def test_a_router_completes_a_run_and_its_hits_are_printed(stack, mode):
    counts = analyze(stack.router, *mode)
    assert counts["Cache hit count"] > 0
    assert counts["Successful request count"] >= counts["Cache hit count"]


def test_a_run_through_shared_memory_completes(stack):
    counts = analyze(stack.router, "--shared-memory", "system", "--output-shared-memory-size", "4096")
    assert counts["Execution count"] > 0


def test_a_worker_completes_a_run(stack):
    assert analyze(stack.workers[0])["Execution count"] > 0
