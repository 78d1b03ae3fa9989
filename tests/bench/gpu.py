"""`make bench-gpu`: what only a machine with CUDA can show, within ten minutes; elsewhere a dry run on the CPU.

Runs the tests marked `gpu`. Sets a CNN and a transformer behind router and worker beside ONNX Runtime in process with
I/O binding, from 64 callers. Measures by NVML the energy that a cache hit saves. A machine without a network gets what
it needs by scripts/gpu-wheels.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from services.inference.execution.execution import CPU, CUDA
from tests.bench import models, networks, peers, worker
from tests.bench.harness import build_loadgen
from tests.bench.models import Model
from tests.bench.peers import Server
from tests.bench.workloads import Workload
from tests.installation import ROOT

# Ten minutes together with scripts/gpu-wheels, which runs before.
MINUTES = 8
IDLE_SECONDS = 5
CONFIG = """
max_batch_size: 64
instance_group { count: 2 }
dynamic_batching { }
response_cache { enable: true }
"""


class Energy:
    """Energy of GPU 0, by the monotonic counter of `nvml` (the module pynvml, initialized)."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._device = nvml.nvmlDeviceGetHandleByIndex(0)
        start, began = self.joules(), time.monotonic()
        time.sleep(IDLE_SECONDS)
        self.idle_watts = (self.joules() - start) / (time.monotonic() - began)

    def joules(self) -> float:
        """Returns the energy used since the driver was loaded. Volta and newer have this counter."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3


def joules_a_call(joules: float, seconds: float, idle_watts: float, calls: int) -> float:
    """Returns the energy of a call above that of an idle GPU in these `seconds`; never below 0."""
    return max(0.0, joules - idle_watts * seconds) / max(calls, 1)


def saved_by_a_hit(energy: Energy, server: Server, model: Model, work: Path, seconds: float) -> str:
    """Describes the GPU energy of a miss and of a hit."""
    took: dict[str, float] = {}
    for kind in ("miss", "hit"):
        workload = Workload(model.name, model.name, kind, model, (worker.CALLERS,))
        bodies = workload.write_bodies(work / f"{model.name}-{kind}.bin", np.random.default_rng(3))
        start, began = energy.joules(), time.monotonic()
        measured = server.measure(workload, bodies, worker.CALLERS, seconds)
        used, lasted = energy.joules() - start, time.monotonic() - began
        took[kind] = joules_a_call(used, lasted, energy.idle_watts, measured.calls)
    return (
        f"energy above {energy.idle_watts:.0f} W idle: {took['miss'] * 1e3:.2f} mJ a miss, {took['hit'] * 1e3:.2f} mJ "
        f"a hit; a hit saves {(took['miss'] - took['hit']) * 1e3:.2f} mJ of the GPU"
    )


def starts_cuda() -> bool:
    """Whether ONNX Runtime can start its CUDA provider; it may be built with CUDA and still fail."""
    if CUDA not in onnxruntime.get_available_providers():
        return False
    onnxruntime.preload_dlls()
    with tempfile.TemporaryDirectory() as folder:
        models.write(models.MLP, Path(folder))
        session = onnxruntime.InferenceSession(Path(folder, "mlp", "1", "model.onnx"), providers=[CUDA, CPU])
    return CUDA in session.get_providers()


def nvml() -> Any | None:
    """Returns the module pynvml, initialized, or None without it or a driver."""
    try:
        module = import_module("pynvml")
        module.nvmlInit()
    except Exception as error:  # no package, driver or device; each raises a different error
        print(f"no NVML, so energy is not measured: {error}")
        return None
    return module


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(MINUTES * 60)
    if starts_cuda():
        provider, chosen = CUDA, (networks.cnn(), networks.transformer())
    else:
        print("CUDA does not start here: a dry run on the CPU, whose numbers mean nothing")
        provider, chosen = CPU, (networks.cnn(32, (8, 16), (1, 1)), networks.transformer(1, 32, 16, 2))
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", "tests/unit/test_gpu.py"]
    failed = subprocess.run(tests, cwd=ROOT, timeout=180).returncode
    generator, found = build_loadgen(), nvml()
    with tempfile.TemporaryDirectory(prefix="ringmesh-gpu-") as folder:
        work = Path(folder)
        for model in chosen:
            models.write(model, work / "models", CONFIG)
        threads = str(os.cpu_count() or 1)
        with peers.router_and_worker("Ringmesh", generator, work / "models", work / "traces", threads) as server:
            energy = Energy(found) if found else None
            for model in chosen:
                inside = worker.InProcess(model, work / "models" / model.name / "1" / "model.onnx", provider)
                worker.compare(server, inside, model, work, arguments.rounds, arguments.seconds)
                if energy:
                    print(saved_by_a_hit(energy, server, model, work, arguments.seconds), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
