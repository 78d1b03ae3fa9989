"""The native engine is pinned, has the private names that fast_path.py uses, and can be taken away."""

import os
import re
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pygrpc_native
import pygrpc_native.aio as native

from services.runtime.rpc.fast_path import FastPathServer

ROOT = Path(__file__).parents[4]
# Without the package: every process can be imported, and a server that asks for the native engine serves with grpcio.
WITHOUT = """
import sys
sys.modules["pygrpc_native"] = None
import asyncio
import grpc
import cache.main, router.main, services.cli.main, services.console.main, services.inference.main, services.ledger.main
from ringmesh.health.v1 import health_pb2, health_pb2_grpc
from services.runtime.rpc.server import Engine, Server

async def main():
    server = Server(Engine.NATIVE, "127.0.0.1:0", [], max_message_bytes=1000, max_connection_age=60)
    port = await server.start()
    server.set_serving(True)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
    await server.stop(0)
    print(type(server._server).__module__, answer.status)

asyncio.run(main())
"""


def test_without_the_native_engine_everything_serves_with_grpcio():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(WITHOUT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["grpc.aio._server", "1"], done.stderr[-2000:]
    assert "pygrpc-native has no wheel here" in done.stderr


def test_the_native_engine_is_the_pinned_version():
    pinned = re.search(r"^pygrpc-native==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert version("pygrpc-native") == pinned[1]
    assert f"pygrpc-native=={pinned[1]} " in (ROOT / "locks" / "server.txt").read_text()


def test_the_native_engine_has_the_private_names_that_are_used():
    server = FastPathServer([], {})
    own = set(vars(FastPathServer)) | set(re.findall(r"self\.(_\w+)(?:: [^=\n]+)? = ", _source()))
    used = set(re.findall(r"(?:self|super\(\))\.(_[a-z]\w*)", _source()))
    missing = {name for name in used - own if not hasattr(server, name)}
    assert used - own >= {"_front", "_front_args", "_table", "_calls", "_fallback", "_encode"}
    assert not missing
    overridden = {name for name in vars(FastPathServer) if name in vars(native.Server)}
    assert overridden >= {"start", "stop", "_on_events", "_fail", "_run_unary", "_send", "_dispatch"}
    for name in ("recv_batch_details", "respond", "fail", "stream_try_send", "metrics", "close"):
        assert hasattr(pygrpc_native.NativeGrpcFront, name)


def _source():
    return (ROOT / "services" / "runtime" / "rpc" / "fast_path.py").read_text()
