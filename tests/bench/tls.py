"""What TLS costs: hits and computed answers through a plain router, a TLS edge, and the engine grpcio.

    python -m tests.bench.tls --rounds 3

Needs Debian's nghttp2-client (h2load). Prints medians of alternating rounds.
"""

import argparse
import os
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from tests.certificates import Ca
from tests.models import build
from tests.system.conftest import eventually
from tests.system.processes import Started, free_address, kill, start

# Workload: model, rows, columns, requests of a round, concurrent streams.
WORKLOADS = {
    "hits of 0.3 KB": ("mlp", 1, 64, 6000, 32),
    "hits of 64 KB": ("mlp", 256, 64, 800, 8),
    "computed": ("random", 1, 1, 1500, 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    os.umask(0o077)
    with tempfile.TemporaryDirectory(prefix="tls-") as name:
        folder = Path(name)
        started = []
        try:
            ways = servers(folder, started)
            found = {}
            for round in range(rounds + 1):
                for workload in WORKLOADS:
                    for way in random.sample(list(ways), len(ways)):
                        measured = load(folder, *ways[way], *WORKLOADS[workload])
                        if round:  # the first one warms up
                            found.setdefault((workload, way), []).append(measured)
        finally:
            kill(*started)
    for (workload, way), measured in found.items():
        rate, *cpus = (statistics.median(values) for values in zip(*measured, strict=True))
        print(f"{workload:16} {way:18} {rate:7.0f} a second, CPU {' + '.join(f'{cpu:.0f}' for cpu in cpus)} us")


def servers(folder: Path, started: list[Started]) -> dict[str, tuple[str, list[psutil.Process]]]:
    """Starts them all; returns the URL and the processes of each way, the router last."""

    def router(**settings: object) -> Started:
        started.append(start("router", workers=worker.address, audit_share=0, trace_ratio=0, **settings))
        return started[-1]

    def run(address: str, module: list[str], **environment: str) -> Started:
        """What cannot be asked for its health in plain text."""
        command = [sys.executable, "-P", "-m", *module]
        started.append(Started(address, subprocess.Popen(command, env={**os.environ, **environment})))
        eventually(lambda: listens(address))
        return started[-1]

    worker = start("services.inference", models=build(folder / "models"), threads=1)
    started.append(worker)
    certificate, key = map(str, Ca().issue("127.0.0.1").write(folder))
    plain, behind, grpcio = router(), router(address=f"unix:{folder}/router.sock"), router(engine="grpcio")
    edge = ["services.cli", "edge", "--address", free_address(), "--router", f"{folder}/router.sock"]
    edge += ["--folder", f"{folder}/edge", "--tls-certificate", certificate, "--tls-key", key]
    envoy = run(edge[3], edge)
    settings = {"ADDRESS": free_address(), "METRICS_ADDRESS": "127.0.0.1:0", "ENGINE": "grpcio", "TRACE_RATIO": "0"}
    settings |= {"WORKERS": worker.address, "AUDIT_SHARE": "0", "TLS_CERTIFICATE": certificate, "TLS_KEY": key}
    secure = run(settings["ADDRESS"], ["router"], **{f"RINGMESH_{name}": value for name, value in settings.items()})
    return {
        "native": (f"http://{plain.address}", [plain.info]),
        "Envoy and native": (f"https://{envoy.address}", [envoy.info, behind.info]),
        "grpcio with TLS": (f"https://{secure.address}", [secure.info]),
        "grpcio": (f"http://{grpcio.address}", [grpcio.info]),
    }


def listens(address: str) -> bool:
    try:
        socket.create_connection(address.rsplit(":", 1)).close()
    except OSError:
        return False
    return True


def load(
    folder: Path, url: str, processes: list[psutil.Process], model: str, rows: int, columns: int, n: int, streams: int
) -> list[float]:
    """Returns the requests a second, then the CPU of each process in microseconds a request."""
    request = v2.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=[rows, columns])
    request.raw_input_contents.append(np.full((rows, columns), 0.5, np.float32).tobytes())
    message = request.SerializeToString()
    body = folder / "body"
    body.write_bytes(b"\0" + struct.pack(">I", len(message)) + message)
    before = [sum(process.cpu_times()[:2]) for process in processes]
    command = ["h2load", "-n", str(n), "-c", "1", "-m", str(streams), "-d", str(body)]
    command += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    command.append(f"{url}/inference.GRPCInferenceService/ModelInfer")
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = [sum(process.cpu_times()[:2]) for process in processes]
    if f" {n} 2xx" not in said:
        raise RuntimeError(said)
    rate = float(re.search(r"([\d.]+) req/s", said)[1])
    return [rate, *((end - begin) / n * 1e6 for begin, end in zip(before, after, strict=True))]


if __name__ == "__main__":
    main()
