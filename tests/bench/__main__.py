"""`make bench`: hit path and miss path beside their floors, in turn, in one run, as ratios of medians.

Needs g++, pkg-config and libnghttp2-dev for the load generator. Everything runs on this machine, the generator too.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc as v2_grpc

from services.cli import demo_models
from tests.bench.bodies import write_bodies
from tests.bench.harness import build_loadgen, free_port, load, running

console = Console(width=120)


def onnxruntime_rate(model: Path, name: str, array: np.ndarray, seconds: float) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    runs = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        session.run(None, {name: array})
        runs += 1
    return runs * len(array) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is taken, in turn")
    arguments = parser.parse_args()
    loadgen = build_loadgen()
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if "model name" in line), platform.machine())
    console.print(
        f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}; "
        f"{arguments.rounds} rounds of {arguments.seconds:g} s, medians"
    )

    with tempfile.TemporaryDirectory(prefix="ringmesh-bench-") as folder, ExitStack() as stack:
        work = Path(folder)
        demo_models.fill(work / "models", console.print)
        rng = np.random.default_rng(1)
        hits = work / "hits.bin"
        write_bodies(hits, "magika", "bytes", rng.integers(0, 256, (1, 1, 2048), dtype=np.int32))
        misses = work / "misses.bin"
        write_bodies(misses, "mlp", "x", rng.random((400_000, 1, 64), dtype=np.float32))

        start = lambda *command, **environment: stack.enter_context(running(*command, **environment))  # noqa: E731
        echo = {
            engine: start("tests.bench.echo", "one-hop", "--port", str(port := free_port()), "--engine", engine,
                          "--response-bytes", "930", port=port)
            for engine in ("native", "grpcio")
        }  # fmt: skip
        back = start(
            "tests.bench.echo", "back", "--port", str(port := free_port()), "--response-bytes", "90", port=port
        )
        two_hop = start("tests.bench.echo", "two-hop", "--port", str(port := free_port()), "--back", str(back.port),
                        "--response-bytes", "90", port=port)  # fmt: skip
        worker = start("services.inference", port=(port := free_port()), address=f"127.0.0.1:{port}",
                       models=str(work / "models"), threads="1")  # fmt: skip
        router = {
            engine: start("router", port=(port := free_port()), address=f"127.0.0.1:{port}", engine=engine,
                          workers=f"127.0.0.1:{worker.port}")
            for engine in ("native", "grpcio")
        }  # fmt: skip
        with grpc.insecure_channel(f"127.0.0.1:{router['native'].port}") as channel:
            body = hits.read_bytes()[4:]
            response = v2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(v2.ModelInferRequest.FromString(body))
            console.print(f"hit: {len(body)} B in, {response.ByteSize()} B out; miss: tiny MLP, 300 B in, 90 B out")

        cases = {
            ("echo native, 1 hop", 16): (echo["native"], [], hits, "one"),
            ("echo native, 1 hop", 64): (echo["native"], [], hits, "one"),
            ("echo grpcio, 1 hop", 64): (echo["grpcio"], [], hits, "one"),
            ("hit, router native", 16): (router["native"], [], hits, "one"),
            ("hit, router native", 64): (router["native"], [], hits, "one"),
            ("hit, router grpcio", 64): (router["grpcio"], [], hits, "one"),
            ("hit, router native", 1): (router["native"], [], hits, "one"),
            ("echo native, 2 hops", 16): (two_hop, [back], misses, "seq"),
            ("echo native, 2 hops", 64): (two_hop, [back], misses, "seq"),
            ("miss MLP, router + worker", 16): (router["native"], [worker], misses, "seq"),
            ("miss MLP, router + worker", 64): (router["native"], [worker], misses, "seq"),
            ("miss MLP, router + worker", 1): (router["native"], [worker], misses, "seq"),
        }
        results: dict = {case: [] for case in cases}
        ort = []
        offset = 0
        for _ in range(arguments.rounds):
            for case, (*_, order) in cases.items():
                if order == "seq":
                    offset = (offset + 30_000) % 380_000  # each miss is a body not sent before
                target, also, bodies, _ = cases[case]
                measured = load(loadgen, target, bodies, order=order, outstanding=case[1], seconds=arguments.seconds,
                                offset=offset, also=also)  # fmt: skip
                if measured.errors:
                    sys.exit(f"bench: calls failed: {measured}")
                results[case].append(measured)
            model = work / "models" / "mlp" / "1" / "model.onnx"
            ort.append([onnxruntime_rate(model, "x", rng.random((n, 64), dtype=np.float32), 1) for n in (1, 64)])

    floors = {"hit, router native": "echo native, 1 hop", "hit, router grpcio": "echo grpcio, 1 hop",
              "miss MLP, router + worker": "echo native, 2 hops"}  # fmt: skip
    median = lambda case, key: statistics.median(getattr(result, key) for result in results[case])  # noqa: E731
    table = Table("", "outstanding", "req/s", "spread", "p50 ms", "p99 ms", "CPU µs", "of its floor")
    for case in cases:
        rates = [result.rps for result in results[case]]
        floor = (floors.get(case[0], ""), case[1])
        ratio = f"{median(case, 'rps') / median(floor, 'rps'):.2f}" if floor in cases else ""
        table.add_row(
            case[0], str(case[1]), f"{median(case, 'rps'):,.0f}", f"{min(rates):,.0f}-{max(rates):,.0f}",
            f"{median(case, 'p50'):.2f}", f"{median(case, 'p99'):.2f}", f"{median(case, 'cpu_us'):.0f}", ratio,
        )  # fmt: skip
    console.print(table)
    native, grpcio = median(("hit, router native", 64), "rps"), median(("hit, router grpcio", 64), "rps")
    console.print(f"hits, native over grpcio engine at 64 outstanding: {native / grpcio:.1f}")
    single, batched = (statistics.median(rates) for rates in zip(*ort, strict=True))
    console.print(f"ONNX Runtime in process, MLP, one thread: {single:,.0f} rows/s, in batches of 64 {batched:,.0f}")


if __name__ == "__main__":
    main()
