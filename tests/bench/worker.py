"""A worker beside ONNX Runtime in process: what the way through gRPC, and batches of single requests, cost.

    python -m tests.bench.worker [--rounds 5] [--seconds 3] [--width 6144] [--delay-us 0]

The model gains from batches: four layers, two of them [width, width]. In process it runs at the best batch size that 64
callers of one row can fill, and at the best of all, on all cores; the worker has as many threads. In turn, medians of
ratios.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

from tests.bench.bodies import write_bodies
from tests.bench.harness import build_loadgen, free_port, load, running
from tests.bench.models import FEATURES, write_layers

CALLERS = 64


def run_for(session: onnxruntime.InferenceSession, rows: int, seconds: float) -> tuple[float, float]:
    """Rows a second, and the median time of a run in ms."""
    x = np.random.default_rng(1).random((rows, FEATURES), dtype=np.float32)
    session.run(None, {"x": x})
    times = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        session.run(None, {"x": x})
        times.append(time.perf_counter() - start)
    return rows * len(times) / sum(times), statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--width", type=int, default=6144)
    parser.add_argument("--delay-us", type=int, default=0, help="max_queue_delay_microseconds, for batches of 64")
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="ringmesh-bench-") as folder:
        repository = Path(folder) / "models"
        file = write_layers(repository, "wide", arguments.width)
        if arguments.delay_us:
            (repository / "wide/config.pbtxt").write_text(
                "max_batch_size: 64 dynamic_batching { preferred_batch_size: 64 "
                f"max_queue_delay_microseconds: {arguments.delay_us} }}"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cores
        session = onnxruntime.InferenceSession(file, options)
        rates = {rows: run_for(session, rows, 0.7)[0] for rows in (1, 8, 16, 32, 64, 128)}
        best, filled = (max(some, key=rates.__getitem__) for some in (rates, [n for n in rates if n <= CALLERS]))
        sizes = sorted({best, filled})
        print("rows/s in process by batch size:", {rows: round(rate) for rows, rate in rates.items()})
        rng = np.random.default_rng(2)
        bodies = write_bodies(
            Path(folder) / "rows.bin", "wide", "x", rng.random((20_000, 1, FEATURES), dtype=np.float32)
        )
        generator = build_loadgen()
        port = free_port()
        address = f"127.0.0.1:{port}"
        with running(
            "services.inference", port=port, address=address, models=str(repository), threads=str(cores)
        ) as worker:
            many, one = [], []
            for _ in range(arguments.rounds):
                before = [run_for(session, rows, arguments.seconds / 2)[0] for rows in sizes]
                through = load(generator, worker, bodies, order="seq", outstanding=CALLERS, seconds=arguments.seconds)
                after = [run_for(session, rows, arguments.seconds / 2)[0] for rows in reversed(sizes)]
                inside = [(a + b) / 2 for a, b in zip(before, reversed(after), strict=True)]
                many.append((through.rps, inside))
                _, alone = run_for(session, 1, arguments.seconds / 2)
                single = load(generator, worker, bodies, order="seq", outstanding=1, seconds=arguments.seconds / 2)
                one.append((single.p50, alone))
    added = [through - inside for through, inside in one]
    print(f"{CALLERS} callers of one row: {statistics.median(rps for rps, _ in many):,.0f}/s; in process")
    for place, rows in enumerate(sizes):
        ratios = [through / inside[place] for through, inside in many]
        rate = statistics.median(inside[place] for _, inside in many)
        print(
            f"  in batches of {rows}: {rate:,.0f}/s; ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(
        f"one caller, median: {statistics.median(p50 for p50, _ in one):.2f} ms; session.run: "
        f"{statistics.median(inside for _, inside in one):.2f} ms; added {statistics.median(added):.2f} ms "
        f"({min(added):.2f} to {max(added):.2f})"
    )


if __name__ == "__main__":
    main()
