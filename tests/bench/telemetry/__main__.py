"""`python -m tests.bench.telemetry`: what traces cost a cache hit, in turn in one run."""

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc as v2_grpc

from services.cli.commands import demo_models
from tests.bench.bodies import write_bodies
from tests.bench.harness import build_loadgen, load, running
from tests.ports import free_port

# Name, share of requests traced, whether spans are sent.
CASES = (
    ("no traces", "0", False),
    ("slow ones and 1 % traced", "0.01", True),
    ("100 % traced", "1", True),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.telemetry", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    loadgen = build_loadgen()
    with tempfile.TemporaryDirectory(prefix="ringmesh-bench-") as folder, ExitStack() as stack:
        work = Path(folder)
        demo_models.fill(work / "models", lambda _: None)
        body = np.random.default_rng(1).integers(0, 256, (1, 1, 2048), dtype=np.int32)
        bodies = write_bodies(work / "hits.bin", "magika", "bytes", [body[0]])

        def start(module: str, **settings: str):
            port = free_port()
            return stack.enter_context(running(module, port=port, address=f"127.0.0.1:{port}", **settings))

        collector = start("tests.bench.telemetry.collector")
        worker = start("services.inference", models=str(work / "models"), threads="1")
        routers = [
            start(
                "router",
                workers=f"127.0.0.1:{worker.port}",
                trace_ratio=ratio,
                **({"otlp_endpoint": f"http://127.0.0.1:{collector.port}"} if sends else {}),
            )
            for _, ratio, sends in CASES
        ]
        request = v2.ModelInferRequest.FromString(bodies.read_bytes()[4:])
        for router in routers:
            with grpc.insecure_channel(f"127.0.0.1:{router.port}") as channel:
                v2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
        runs = [[] for _ in CASES]
        for turn in range(arguments.rounds):
            pairs = list(zip(runs, routers, strict=True))
            # The order alternates, so that drift affects all cases equally.
            for results, router in pairs[:: 1 - 2 * (turn % 2)]:
                measured = load(
                    loadgen, router, bodies, order="one", outstanding=64, seconds=arguments.seconds, warm_up=0.2
                )
                assert not measured.errors, measured.errors
                results.append(measured)
    table = Table("", "hits/s", "of the first", "router's CPU µs", "of the first", "p99 ms")

    def median(results, key):
        return statistics.median(getattr(result, key) for result in results)

    first = runs[0]
    for (name, *_), results in zip(CASES, runs, strict=True):
        rps, cpu = median(results, "rps"), median(results, "cpu_us")
        # Ratios by round, so that other load on the machine affects both.
        of_rps = statistics.median(a.rps / b.rps for a, b in zip(results, first, strict=True))
        of_cpu = statistics.median(a.cpu_us / b.cpu_us for a, b in zip(results, first, strict=True))
        table.add_row(
            name, f"{rps:,.0f}", f"{of_rps:.3f}", f"{cpu:.1f}", f"{of_cpu:.3f}", f"{median(results, 'p99'):.2f}"
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
