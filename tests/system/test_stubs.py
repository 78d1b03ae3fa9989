"""The stubs alone: all that a client needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENT = """
import sys
import grpc
import tritonclient.grpc  # describes the same names, in the default pool
from ringmesh.oip.v2 import grpc_service_pb2 as v2, grpc_service_pb2_grpc as v2_grpc
from ringmesh.cache.v1 import cache_pb2, cache_pb2_grpc
from ringmesh.inference.v1 import inference_pb2
from ringmesh.router.v1 import router_pb2

assert v2.__file__.startswith(sys.argv[1]), v2.__file__
with grpc.insecure_channel(sys.argv[2]) as channel:
    print(v2_grpc.GRPCInferenceServiceStub(channel).ServerReady(v2.ServerReadyRequest()).ready)
assert not {"router", "cache", "services"} & set(sys.modules), "it needs more than the stubs"
"""


@pytest.fixture(scope="session")
def stubs(tmp_path_factory):
    """A folder with nothing but the generated package."""
    folder = tmp_path_factory.mktemp("stubs")
    binaries = Path(sys.executable).parent
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--target",
            folder,
            ".",
        ],
        cwd=ROOT / "protos",
        env={**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"},
        check=True,
    )
    return folder


def test_a_client_with_only_the_stubs_calls_a_router(stubs, stack):
    done = subprocess.run(
        [sys.executable, "-P", "-c", CLIENT, str(stubs), stack.router],
        env={**os.environ, "PYTHONPATH": str(stubs)},
        cwd=stubs,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_the_stubs_are_typed(stubs):
    assert (stubs / "ringmesh" / "py.typed").exists()
    assert "class ModelInferRequest" in (stubs / "ringmesh/oip/v2/grpc_service_pb2.pyi").read_text()
