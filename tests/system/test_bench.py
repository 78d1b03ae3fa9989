"""The bench runs end to end, and what it stands on of the product has not changed beneath it."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.bench import peers
from tests.installation import PACKAGES, ROOT


def test_an_echo_answers_as_many_bytes_as_it_was_told(tmp_path):
    with peers.echo("echo", tmp_path, 100) as echo:
        assert echo.response_bytes(b"any") == 100


def test_an_echo_behind_envelopes_answers_too(tmp_path):
    with peers.echo_behind_envelopes("echo", tmp_path, 100) as echo:
        assert echo.response_bytes(b"any") == 100


@pytest.mark.proof  # it needs the load generator, and brings up two stacks
def test_two_trees_are_compared_each_by_what_ringmesh_up_starts_from_it(tmp_path):
    other = tmp_path / "tree"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, other)
    started = tmp_path / "started"
    with (other / "router" / "main.py").open("a") as main:
        main.write(f"\n__import__('pathlib').Path({str(started)!r}).touch()\n")
    bench = (sys.executable, "-m", "tests.bench", "--against", other)
    ran = subprocess.run(
        [*bench, "--only", "hit", "--rounds", "1", "--seconds", "1"],
        cwd=ROOT,
        env={**os.environ, "CC": "none"},  # to compile the other tree would take a minute
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("too few rounds") == 3
    assert started.exists()
