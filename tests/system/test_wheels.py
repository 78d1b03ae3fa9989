"""The two wheels, of the server and of the stubs, serve from an environment that has nothing of the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
import venv
from pathlib import Path

import grpc
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc as v2_grpc

from setup import compiled_sources, has_compiler
from tests import triton_models
from tests.installation import ROOT
from tests.system.conftest import start_stack, stop_stack

# Each builds wheels, for half a minute or more.
pytestmark = pytest.mark.proof

EXTENSION = sysconfig.get_config_var("EXT_SUFFIX")
COMPILED = pytest.mark.skipif(not has_compiler(), reason="there is no C compiler")
WHERE = "import cache, ringmesh, router, services as s; print(*(m.__path__ for m in (cache, ringmesh, router, s)))"


def run(*command, **environment):
    binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    environment["PATH"] = binaries
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(folder, **environment):
    """Both wheels, and what the build printed."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    printed = run(
        *pip, "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", folder, ".", "./protos", **environment
    )
    return folder, printed


@pytest.fixture(scope="module")
def compiled_wheels(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wheels"))


@pytest.fixture
def pure_wheels(tmp_path):
    return build(tmp_path / "wheels", CC="none")


def install(wheels, home):
    """The folder of packages. What they need is taken from the environment of the tests."""
    venv.create(home, symlinks=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", home / "bin" / "python")
    run(*pip, "install", "--no-deps", "--force-reinstall", *wheels.iterdir())
    return packages


def compiled_label(metrics):
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=60) as response:
        (build,) = re.findall("^ringmesh_build_info.*$", response.read().decode(), re.MULTILINE)
    return re.search('compiled="(.*?)"', build)[1]


@pytest.mark.parametrize(
    ("wheels", "is_compiled"),
    [
        pytest.param("pure_wheels", "false", id="without a C compiler"),
        pytest.param("compiled_wheels", "true", id="with a C compiler", marks=COMPILED),
    ],
)
def test_the_wheels_serve_from_a_clean_environment(request, models, tmp_path, wheels, is_compiled):
    home = tmp_path / "environment"
    wheels, built = request.getfixturevalue(wheels)
    packages = install(wheels, home)
    assert ("building a pure wheel" in built) == (is_compiled == "false")
    assert {str(source.with_suffix(EXTENSION)) for source in compiled_sources() if is_compiled == "true"} == {
        str(path.relative_to(packages)) for path in packages.glob("[crs]*/**/*.so")
    }
    assert run(home / "bin" / "python", "-P", "-c", WHERE).count(str(packages)) == 4
    assert run(home / "bin" / "ringmesh", "--version").endswith(
        "(compiled)\n" if is_compiled == "true" else "(not compiled)\n"
    )

    elsewhere = tmp_path / "elsewhere"
    # Where the tests run the sources, PYTHONPATH names them.
    ringmesh = ["env", "-u", "PYTHONPATH", home / "bin" / "ringmesh"]
    stack = start_stack(elsewhere, "--models", str(models), cwd=tmp_path, ringmesh=ringmesh)
    with grpc.insecure_channel(stack.router) as channel:
        assert v2_grpc.GRPCInferenceServiceStub(channel).ServerReady(v2.ServerReadyRequest()).ready
    processes = json.loads((elsewhere / "stack.json").read_text())["metrics"]
    assert {name: compiled_label(metrics) for name, metrics in processes.items()} == dict.fromkeys(
        processes, is_compiled
    )
    assert stop_stack(stack) == 0


def test_a_new_user_gets_an_answer_of_each_example_model(compiled_wheels, tmp_path, capsys):
    """By scripts/first-answer: a new user's way from the wheels to a first answer, whose time it prints, and on to the
    console in a real browser."""
    triton_models.build(tmp_path / "models")
    wheels, _ = compiled_wheels
    done = subprocess.run(
        [ROOT / "scripts/first-answer", wheels, tmp_path / "models"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=600,
    )
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"(?m)^ *(\d+\.\d) s  (.*)$", done.stdout)
    assert [re.sub("installed .*", "installed", step) for _, step in steps] == [
        "installed",
        f"checked {len(triton_models.CONFIGS)} models",
        "serving",
        "first answer: densenet_onnx by grpcurl",
        "an answer of each model to each sample request",
        "the console in a browser shows each model"
        if any(map(shutil.which, ("chromium", "google-chrome")))
        else "no chromium and no google-chrome here: the console was not opened",
    ]
    seconds = [float(second) for second, _ in steps]
    assert seconds == sorted(seconds)
