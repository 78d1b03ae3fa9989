"""Wheels too large to be carried in one piece arrive as they were, or not at all."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu-wheels"


@pytest.fixture
def folder(tmp_path):
    """Two wheels, one of them in three parts."""
    wheels = {"large.whl": os.urandom(5000), "small.whl": os.urandom(10)}
    (tmp_path / "small.whl").write_bytes(wheels["small.whl"])
    for number in range(3):
        part = wheels["large.whl"][2000 * number : 2000 * (number + 1)]
        (tmp_path / f"large.whl.part-0{number}").write_bytes(part)
    sums = [f"{hashlib.sha256(wheel).hexdigest()}  ./{name}\n" for name, wheel in wheels.items()]
    (tmp_path / "SHA256SUMS").write_text("".join(sums))
    return tmp_path


def run(folder):
    """With `true` as the Python, which is told to install and to measure, and does neither."""
    return subprocess.run([SCRIPT, "run", folder], env={**os.environ, "PYTHON": "true"}, capture_output=True, text=True)


def test_parts_are_joined_in_their_order_and_removed(folder):
    parts = b"".join(path.read_bytes() for path in sorted(folder.glob("*.part-*")))
    ran = run(folder)
    assert ran.returncode == 0, ran.stderr
    assert (folder / "large.whl").read_bytes() == parts
    assert not list(folder.glob("*.part-*"))
    assert run(folder).returncode == 0


def test_a_part_that_is_missing_or_damaged_ends_it(folder):
    (folder / "large.whl.part-01").write_bytes(b"")
    ran = run(folder)
    assert ran.returncode != 0
    assert "large.whl: FAILED" in ran.stdout + ran.stderr
