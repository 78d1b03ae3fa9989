"""Ringmesh beside ONNX Runtime in process: what the way through gRPC, and batches of single requests, cost.

    python -m tests.bench.worker [--rounds 5] [--seconds 3] [--width 6144] [--delay-us 0]

The model gains from batches: four layers, two of them [width, width]. In process it runs with I/O binding at the best
batch size that 64 callers of one row can fill, and at the best of all, on all cores; the worker has as many threads. In
turn, medians of ratios.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

from tests.bench.harness import build_loadgen, running
from tests.bench.models import FEATURES, Model, write_layers
from tests.bench.peers import Server
from tests.bench.results import Spread
from tests.bench.workloads import Workload
from tests.ports import free_port

CALLERS = 64
SIZES = (1, 8, 16, 32, 64, 128)


class InProcess:
    """ONNX Runtime with bound inputs and outputs, called by one thread."""

    def __init__(self, model: Model, file: Path, provider: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = os.cpu_count() or 1
        self._model = model
        self._session = onnxruntime.InferenceSession(file, options, providers=[provider])

    def run_for(self, rows: int, seconds: float) -> tuple[float, float]:
        """Returns rows a second, and the median time of a run in ms; inputs and outputs are in the host's memory."""
        x = np.concatenate([self._model.row(np.random.default_rng(1))] * rows)
        times: list[float] = []
        end = time.perf_counter() + seconds
        self._run(x)
        while (start := time.perf_counter()) < end or not times:
            self._run(x)
            times.append(time.perf_counter() - start)
        return rows * len(times) / sum(times), statistics.median(times) * 1e3

    def _run(self, x: np.ndarray) -> None:
        binding = self._session.io_binding()
        binding.bind_cpu_input(self._model.input, x)
        binding.bind_output(self._model.output)
        self._session.run_with_iobinding(binding)
        binding.copy_outputs_to_cpu()


def compare(server: Server, inside: InProcess, model: Model, work: Path, rounds: int, seconds: float) -> None:
    """Prints the throughput ratio of CALLERS callers of `server` to `inside`, and the latency added for one caller."""
    rates = {rows: inside.run_for(rows, seconds / 4)[0] for rows in SIZES}
    print(f"{model.name}: rows/s in process by batch size:", {rows: round(rate) for rows, rate in rates.items()})
    sizes = sorted({max(some, key=rates.__getitem__) for some in (SIZES, [n for n in SIZES if n <= CALLERS])})
    misses = Workload(model.name, model.name, "miss", model, (CALLERS,))
    bodies = misses.write_bodies(work / f"{model.name}.bin", np.random.default_rng(2))
    many: list[float] = []
    by_size: dict[int, list[float]] = {rows: [] for rows in sizes}
    alone: list[tuple[float, float]] = []
    for _ in range(rounds):
        before = [inside.run_for(rows, seconds / 2)[0] for rows in sizes]
        many.append(server.measure(misses, bodies, CALLERS, seconds).rps)
        after = [inside.run_for(rows, seconds / 2)[0] for rows in reversed(sizes)]
        for rows, a, b in zip(sizes, before, reversed(after), strict=True):
            by_size[rows].append((a + b) / 2)
        alone.append((server.measure(misses, bodies, 1, seconds / 2).p50, inside.run_for(1, seconds / 2)[1]))
    print(f"{CALLERS} callers of one row: {statistics.median(many):,.0f}/s; in process")
    for rows, found in by_size.items():
        ratio = Spread.of([a / b for a, b in zip(many, found, strict=True)])
        print(f"  in batches of {rows}: {statistics.median(found):,.0f}/s; ratio {ratio}")
    through, direct = (statistics.median(times) for times in zip(*alone, strict=True))
    added = Spread.of([a - b for a, b in alone])
    print(f"one caller, median: {through:.2f} ms; in process: {direct:.2f} ms; added {added} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--width", type=int, default=6144)
    parser.add_argument("--delay-us", type=int, default=0, help="max_queue_delay_microseconds, for batches of 64")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ringmesh-bench-") as folder:
        work = Path(folder)
        file = write_layers(work / "models", "wide", arguments.width)
        if arguments.delay_us:
            (work / "models/wide/config.pbtxt").write_text(
                "max_batch_size: 64 dynamic_batching { preferred_batch_size: 64 "
                f"max_queue_delay_microseconds: {arguments.delay_us} }}"
            )
        model = Model("wide", "FP32", "x", [FEATURES], "y", [16], lambda _: file)
        port = free_port()
        with running(
            "services.inference",
            port=port,
            address=f"127.0.0.1:{port}",
            models=str(work / "models"),
            threads=str(os.cpu_count() or 1),
        ) as worker:
            server = Server("worker", build_loadgen(), worker)
            inside = InProcess(model, file, "CPUExecutionProvider")
            compare(server, inside, model, work, arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
