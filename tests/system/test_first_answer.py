"""scripts/first-answer: a new user's way from the wheels to a first answer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import triton_models
from tests.installation import ROOT

pytestmark = pytest.mark.proof


def test_a_new_user_gets_an_answer_of_each_example_model(tmp_path, capsys):
    triton_models.build(tmp_path / "models")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        tmp_path / "dist",
    ]
    subprocess.run([*wheel, ".", "./protos"], cwd=ROOT, env={**os.environ, "PATH": path}, check=True)
    done = subprocess.run(
        [ROOT / "scripts/first-answer", tmp_path / "dist", tmp_path / "models"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=600,
    )
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d s  first answer: densenet_onnx by grpcurl", done.stdout)
    assert "an answer of each model" in done.stdout
