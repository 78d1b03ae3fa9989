"""Starts servers as processes, loads them, and measures throughput, latency, CPU and memory.

The load generator runs on the same machine and shares its cores. It needs g++, pkg-config and libnghttp2-dev.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from ringmesh.health.v1 import health_pb2, health_pb2_grpc

from tests.installation import ROOT

HERE = Path(__file__).parent


def positive(text: str) -> float:
    """For arguments: a finite number above 0. Raises ValueError."""
    if not 0 < (value := float(text)) < float("inf"):
        raise ValueError(text)
    return value


def count(text: str) -> int:
    """For arguments: a whole number from 1. Raises ValueError."""
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


WARM_UP_SECONDS = 0.5
# Arguments: a folder with `tests`, last on the path so that Ringmesh is not imported from it; a module; the module's
# own arguments.
RUN_MODULE_OF_TESTS = """
import runpy, sys
sys.path.append(sys.argv.pop(1))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


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


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def _serves(port: int) -> bool:
    # A separate subchannel pool: the shared one would apply backoff after the last failed attempt.
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel, suppress(grpc.RpcError):
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(), timeout=1).status == 1
    return False


class Process:
    """A gRPC server with the health service, started and SERVING. Measurements include its child processes.

    `port` is a number, or the `stack.json` of a `ringmesh up`, which is written when everything is ready.
    """

    def __init__(
        self, *command: str, port: int | Path, environment: dict[str, str] | None = None, patience: float = 30
    ) -> None:
        started = time.monotonic()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, stdout=self._said, stderr=self._said
        )
        self._info = psutil.Process(self._process.pid)
        while not (port.exists() if isinstance(port, Path) else _serves(port)):
            if time.monotonic() > started + patience or self._process.poll() is not None:
                self.stop()
                self._said.seek(0)
                raise RuntimeError(f"{' '.join(command)} does not come up: {self._said.read()[-9000:].decode()}")
            time.sleep(0.01)
        self.ready_seconds = time.monotonic() - started
        self.stack = json.loads(port.read_text()) if isinstance(port, Path) else {}
        self.port = port_of(self.stack["router"]) if isinstance(port, Path) else port

    def _all(self) -> list[psutil.Process]:
        return [self._info, *self._info.children(recursive=True)]

    def cpu_seconds(self) -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in self._all()))

    def forget_peak(self) -> None:
        """Restarts the measurement of peak memory."""
        for process in self._all():
            with suppress(OSError):
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """Returns the peak resident size; shared pages count in each process that maps them."""
        total = 0
        for process in self._all():
            status = Path(f"/proc/{process.pid}/status").read_text()
            total += int(status.partition("VmHWM:")[2].split()[0]) * 1024
        return total

    def resident_bytes(self) -> int:
        return sum(process.memory_info().rss for process in self._all())

    def level_priority(self) -> None:
        """Gives all threads the niceness of this process, also those that chose their own."""
        for process in self._all():
            for thread in process.threads():
                os.setpriority(os.PRIO_PROCESS, thread.id, os.getpriority(os.PRIO_PROCESS, 0))

    def stop(self) -> None:
        processes = self._all() if self._process.poll() is None else []
        self._process.terminate()
        psutil.wait_procs(processes, timeout=30)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()


@contextmanager
def running(module: str, *arguments: str, port: int, patience: float = 60, **settings: str) -> Iterator[Process]:
    """Runs `python -m module` with RINGMESH_* settings and the installed Ringmesh."""
    environment = {"RINGMESH_METRICS_ADDRESS": "127.0.0.1:0"}
    environment |= {f"RINGMESH_{name.upper()}": value for name, value in settings.items()}
    how = ("-c", RUN_MODULE_OF_TESTS, str(ROOT)) if module.startswith("tests.") else ("-m",)
    command = (sys.executable, "-P", *how, module, *arguments)
    process = Process(*command, port=port, environment=environment, patience=patience)
    try:
        yield process
    finally:
        process.stop()


@dataclass(frozen=True, slots=True)
class Measured:
    """One load run. `ok` counts calls that succeeded within the measured time, `calls` counts all.

    Latencies are in ms, of the slowest generator; CPU is of the servers, in µs a call, memory of the servers, in bytes.
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
    generators: int = 1,
) -> Measured:
    """Runs a closed-loop load on `target`; `also` are servers behind it whose CPU and memory count.

    `order` is one (always the body at `offset`), seq (each once, from `offset`), uniform or zipf:S. If `stamp` is not
    0, each call sends a unique body, whatever the order: those from `stamp` to `stamp` + `calls`. The `outstanding`
    calls are divided among `generators`, each a process, and sent over 4 connections, or over 200 from 1,024 calls.
    """
    processes = [target, *also]
    for process in processes:
        process.forget_peak()
    before = [process.cpu_seconds() for process in processes]
    each = outstanding // generators
    command = [
        loadgen, "--target", f"127.0.0.1:{target.port}", "--bodies", bodies, "--order", order, "--offset", offset,
        "--concurrency", each, "--connections", 200 if each >= 1024 else min(4, each),
        "--seconds", seconds, "--warmup", warm_up,
    ]  # fmt: skip
    running = [
        subprocess.Popen(
            # A stamp has 42 bits.
            [*map(str, command), "--seed", str(number + 1), "--stamp", str(stamp and stamp + (number << 36))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(generators)
    ]
    results = []
    for generator in running:
        try:
            said, complaint = generator.communicate(timeout=seconds + warm_up + 90)
        finally:
            generator.kill()
        if not said:
            raise RuntimeError(f"load generator: {complaint.decode()}")
        results.append(json.loads(said))
    used = sum(process.cpu_seconds() - start for process, start in zip(processes, before, strict=True))
    calls = sum(result["total"] for result in results)
    errors = sum((Counter(result["errors"]) for result in results), Counter())
    return Measured(
        ok=sum(result["ok"] for result in results),
        calls=calls,
        errors=dict(errors),
        rps=sum(result["rps"] for result in results),
        p50=max(result["p50_ms"] for result in results),
        p99=max(result["p99_ms"] for result in results),
        p999=max(result["p999_ms"] for result in results),
        cpu_us=used / max(calls, 1) * 1e6,
        peak_bytes=sum(process.peak_bytes() for process in processes),
        response_bytes=results[0]["response_bytes"],
        distinct=max(result["distinct"] for result in results),
    )
