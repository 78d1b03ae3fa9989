"""The first calls to make on a new stack, ready to be copied into a shell."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

_SERVICE = "inference.GRPCInferenceService"


@dataclass(frozen=True, slots=True)
class FirstCalls:
    """Shell commands. `trace` shows the trace of the `grpcurl` call; "" if that call is not an inference."""

    grpcurl: str
    tritonclient: str
    trace: str = ""


def of_mlp(router: str, state: Path) -> FirstCalls:
    """Returns calls that run a traced inference on the demo MLP."""
    trace_id = f"{random.getrandbits(128) or 1:032x}"
    parent = f"{random.getrandbits(64) or 1:016x}"
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 64], "contents": {"fp32_contents": [1] * 64}}
    header = f"-H 'traceparent: 00-{trace_id}-{parent}-01'"
    grpcurl = _grpcurl(router, {"model_name": "mlp", "inputs": [tensor]}, "ModelInfer", header)
    lines = [
        "x = triton.InferInput('x', [1, 64], 'FP32')",
        "x.set_data_from_numpy(np.ones((1, 64), np.float32))",
        "print(client.infer('mlp', [x]).as_numpy('y'))",
    ]
    return FirstCalls(grpcurl, _triton(router, lines), show_trace(trace_id, state))


def of_model(router: str, model: str) -> FirstCalls:
    """Returns calls that read the model's inputs and outputs."""
    grpcurl = _grpcurl(router, {"name": model}, "ModelMetadata", "")
    return FirstCalls(grpcurl, _triton(router, [f"print(client.get_model_metadata({model!r}))"]))


def show_trace(trace_id: str, state: Path) -> str:
    """Returns the command that shows a trace written under `state`."""
    where = "" if state == Path(".ringmesh") else f" --state {shlex.quote(str(state))}"
    return f"{_script('ringmesh')} trace {trace_id}{where}"


def _grpcurl(router: str, request: object, method: str, header: str) -> str:
    data = shlex.quote(json.dumps(request, separators=(",", ":")))
    command = f"{_script('grpcurl')} -plaintext" + (f" {header}" if header else "")
    return f"{command} \\\n  -d {data} \\\n  {router} {_SERVICE}/{method}"


def _triton(router: str, lines: list[str]) -> str:
    setup = ["import numpy as np, tritonclient.grpc as triton", f"client = triton.InferenceServerClient({router!r})"]
    return "\n".join([f"{_shown(Path(sys.executable))} - <<'EOF'", *setup, *lines, "EOF"])


def _script(name: str) -> str:
    """Returns the script next to the running Python, as `make up` activates no environment; else the one on PATH."""
    beside = Path(sys.executable).parent / name
    return _shown(beside) if beside.exists() else shlex.quote(shutil.which(name) or name)


def _shown(path: Path) -> str:
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
