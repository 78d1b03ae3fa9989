"""Servers as processes, load on them, and what it cost: throughput, latency, CPU, memory.

The load generator runs on the same machine and takes its share of the cores. It needs g++, pkg-config and
libnghttp2-dev.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from ringmesh.health.v1 import health_pb2, health_pb2_grpc

HERE = Path(__file__).parent
WARM_UP_SECONDS = 0.5


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def build_loadgen() -> Path:
    binary = HERE / "build" / "loadgen"
    source = HERE / "loadgen" / "loadgen.cc"
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        tools = shutil.which("g++") and shutil.which("pkg-config")
        if not tools or subprocess.run(["pkg-config", "--exists", "libnghttp2"]).returncode:
            sys.exit("bench: the load generator must be compiled; apt-get install g++ pkg-config libnghttp2-dev")
        binary.parent.mkdir(exist_ok=True)
        subprocess.run(["bash", HERE / "loadgen" / "build.sh", binary], check=True, stdout=subprocess.DEVNULL)
    return binary


class Process:
    """A gRPC server with the health service, started and SERVING. Its children count as its own."""

    def __init__(
        self,
        *command: str,
        port: int,
        environment: dict[str, str] | None = None,
        patience: float = 30,
    ) -> None:
        self.port = port
        started = time.monotonic()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, stdout=self._said, stderr=self._said
        )
        self._info = psutil.Process(self._process.pid)
        options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 50)]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                with suppress(grpc.RpcError):
                    if stub.Check(health_pb2.HealthCheckRequest(), timeout=1).status == 1:
                        break
                if time.monotonic() > started + patience or self._process.poll() is not None:
                    self._process.kill()
                    self._said.seek(0)
                    raise RuntimeError(f"{' '.join(command)} does not come up: {self._said.read()[-9000:].decode()}")
                time.sleep(0.01)
        self.ready_seconds = time.monotonic() - started

    def _all(self) -> list[psutil.Process]:
        return [self._info, *self._info.children(recursive=True)]

    def cpu_seconds(self) -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in self._all()))

    def forget_peak(self) -> None:
        """Peak memory is measured from here on."""
        for process in self._all():
            with suppress(OSError):
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """Largest resident size, shared pages counted in each process that has them."""
        total = 0
        for process in self._all():
            status = Path(f"/proc/{process.pid}/status").read_text()
            total += int(status.partition("VmHWM:")[2].split()[0]) * 1024
        return total

    def resident_bytes(self) -> int:
        return sum(process.memory_info().rss for process in self._all())

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            for process in reversed(self._all()):
                process.kill()
            self._process.wait()


@contextmanager
def running(
    module: str, *arguments: str, port: int, packages: Path | None = None, patience: float = 60, **settings: str
) -> Iterator[Process]:
    """`python -m module` with RINGMESH_* settings; Ringmesh as it is installed in .venv or, if given, in `packages`."""
    environment = {"RINGMESH_METRICS_ADDRESS": "127.0.0.1:0"}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    environment |= {f"RINGMESH_{name.upper()}": value for name, value in settings.items()}
    safe = () if module.startswith("tests.") else ("-P",)
    command = (sys.executable, *safe, "-m", module, *arguments)
    process = Process(*command, port=port, environment=environment, patience=patience)
    try:
        yield process
    finally:
        process.stop()


@dataclass(frozen=True, slots=True)
class Measured:
    """One load run. `ok` ended well within the time measured, `calls` are all.

    Latencies in ms, CPU of the servers in µs a call, memory of the servers in bytes.
    """

    ok: int
    calls: int
    errors: dict[str, int]
    rps: float
    p50: float
    p99: float
    p999: float
    cpu_us: float
    peak_bytes: int
    response_bytes: float
    distinct: int
    loadgen_cpu_share: float


def load(
    loadgen: Path,
    target: Process,
    bodies: Path,
    *,
    order: str,
    outstanding: int,
    seconds: float,
    offset: int = 0,
    stamp: int = 0,
    warm_up: float = WARM_UP_SECONDS,
    also: Sequence[Process] = (),
) -> Measured:
    """Closed-loop load on `target`; `also` are the servers behind it whose CPU and memory count.

    `order` is one (the body at `offset`, again and again), seq (each once, from `offset`), uniform or zipf:S. Where
    `stamp` is not 0 each call sends a body of its own, whatever the order: those from `stamp` to `stamp` + `calls`.
    """
    processes = [target, *also]
    for process in processes:
        process.forget_peak()
    before = [process.cpu_seconds() for process in processes]
    command = [
        loadgen, "--target", f"127.0.0.1:{target.port}", "--bodies", bodies, "--order", order, "--offset", offset,
        "--stamp", stamp, "--concurrency", outstanding, "--connections", min(4, outstanding),
        "--seconds", seconds, "--warmup", warm_up,
    ]  # fmt: skip
    ran = subprocess.run(list(map(str, command)), capture_output=True, timeout=seconds + warm_up + 90)
    if not ran.stdout:
        raise RuntimeError(f"load generator: {ran.stderr.decode()}")
    result = json.loads(ran.stdout)
    used = sum(process.cpu_seconds() - start for process, start in zip(processes, before, strict=True))
    return Measured(
        ok=result["ok"],
        calls=result["total"],
        errors=result["errors"],
        rps=result["rps"],
        p50=result["p50_ms"],
        p99=result["p99_ms"],
        p999=result["p999_ms"],
        cpu_us=used / max(result["total"], 1) * 1e6,
        peak_bytes=sum(process.peak_bytes() for process in processes),
        response_bytes=result["response_bytes"],
        distinct=result["distinct"],
        loadgen_cpu_share=result["loadgen_cpu_s"] / seconds,
    )
