"""The peers of a benchmark: `ringmesh up`, its router and worker alone, Triton, and the floors of each."""

import os
import sys
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
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc as v2_grpc

from tests.bench.harness import Measured, Process, load, port_of, running
from tests.bench.models import Model
from tests.bench.workloads import ZIPF_SECONDS, Workload
from tests.ports import free_port

# The benchmarks measure sustained load, not how overload is refused.
QUEUE_SECONDS = "30"


class Peer(Protocol):
    """A system that is measured under a workload."""

    name: str

    def measure(self, workload: Workload, bodies: Path, outstanding: int, seconds: float) -> Measured:
        """Measures one run."""


@dataclass
class Server:
    """A gRPC server. `behind` are the processes behind `front`; `workers` are the ports of those that run models."""

    name: str
    loadgen: Path
    front: Process
    behind: tuple[Process, ...] = ()
    workers: tuple[int, ...] = ()
    stamp: int = field(default=1, init=False)

    def measure(self, workload: Workload, bodies: Path, outstanding: int, seconds: float) -> Measured:
        """Measures one run. A miss is a body that was never sent before."""
        zipf = workload.kind == "zipf"
        measured = load(
            self.loadgen,
            self.front,
            bodies,
            order=workload.order,
            outstanding=outstanding,
            seconds=max(seconds, ZIPF_SECONDS) if zipf else seconds,
            stamp=self.stamp if workload.kind == "miss" else 0,
            warm_up=0 if zipf else 0.5,
            also=self.behind,
        )
        self.stamp += measured.calls
        if measured.errors:
            raise RuntimeError(f"{self.name}, {workload.name} at {outstanding}: calls failed: {measured.errors}")
        if not measured.ok:
            raise RuntimeError(f"{self.name}, {workload.name} at {outstanding}: no call ended within {seconds} s")
        return measured

    def executed(self, model: str) -> int:
        """Returns the number of rows that the model has run so far."""
        rows = 0
        for port in self.workers or (self.front.port,):
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = v2_grpc.GRPCInferenceServiceStub(channel)
                (statistics,) = stub.ModelStatistics(v2.ModelStatisticsRequest(name=model)).model_stats
                rows += int(statistics.inference_count)
        return rows

    def response_bytes(self, body: bytes) -> int:
        """Returns the size of the answer to `body`."""
        with grpc.insecure_channel(
            f"127.0.0.1:{self.front.port}", [("grpc.max_receive_message_length", -1)]
        ) as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            return len(infer(body, timeout=30))


@contextmanager
def ringmesh_up(
    name: str, loadgen: Path, models: Path, state: Path, *arguments: str, packages: Path | None = None
) -> Iterator[Server]:
    """Starts `ringmesh up`, the installed one or that of `packages`, with its defaults and `arguments`."""
    environment = {"RINGMESH_QUEUE_SECONDS": QUEUE_SECONDS} | ({"PYTHONPATH": str(packages)} if packages else {})
    command = (sys.executable, "-P", "-m", "services.cli", "up", "--port", "0")
    process = Process(
        *(*command, "--models", str(models), "--state", str(state), *arguments),
        port=state / "stack.json",
        environment=environment,
        patience=120,
    )
    try:
        yield Server(name, loadgen, process, workers=tuple(map(port_of, process.stack["workers"])))
    finally:
        process.stop()


@contextmanager
def router_and_worker(name: str, loadgen: Path, models: Path, traces: Path, threads: str = "2") -> Iterator[Server]:
    """Starts one router and one worker with their defaults: 1 % of the requests traced, metrics, no Redis.

    `threads` are those of a model, which its instances share.
    """
    port = free_port()
    with running(
        "services.inference",
        port=port,
        address=f"127.0.0.1:{port}",
        models=str(models),
        threads=threads,
        trace_dir=str(traces),
    ) as worker:
        workers, front = f"127.0.0.1:{port}", free_port()
        settings = {"workers": workers, "queue_seconds": QUEUE_SECONDS, "trace_dir": str(traces)}
        with running("router", port=front, address=f"127.0.0.1:{front}", **settings) as router:
            yield Server(name, loadgen, router, (worker,), (port,))


@contextmanager
def echo(name: str, loadgen: Path, response_bytes: int) -> Iterator[Server]:
    """Starts a server that answers each call with `response_bytes` bytes."""
    port = free_port()
    arguments = ("one-hop", "--port", str(port), "--response-bytes", str(response_bytes))
    with running("tests.bench.echo", *arguments, port=port) as process:
        yield Server(name, loadgen, process)


@contextmanager
def echo_behind_envelopes(name: str, loadgen: Path, response_bytes: int) -> Iterator[Server]:
    """Starts two such servers, one behind the other, connected by the router's worker client."""
    size = ("--response-bytes", str(response_bytes))
    port = free_port()
    with running("tests.bench.echo", "back", "--port", str(port), *size, port=port) as back:
        port, behind = free_port(), ("--back", str(port))
        with running("tests.bench.echo", "two-hop", "--port", str(port), *behind, *size, port=port) as front:
            yield Server(name, loadgen, front, (back,))


@dataclass
class InProcess:
    """ONNX Runtime, called directly by one thread a core; outstanding rows run in batches or one by one."""

    name: str
    model: Model
    path: Path
    batches: bool

    def measure(self, workload: Workload, bodies: Path, outstanding: int, seconds: float) -> Measured:
        """Measures one run. `bodies` is not read; the rows have the same size."""
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
        return Measured(done, done, {}, done / seconds, p50, p99, p999, cpu / done * 1e6, 0, 0, 0)
