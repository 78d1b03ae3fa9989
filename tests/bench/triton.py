"""Triton as a peer: the real server, with its python backend and its local response cache, on the same ONNX files."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.harness import Process
from tests.bench.models import CONFIG, Model
from tests.installation import ROOT
from tests.ports import free_port

FOLDER = ROOT / ".venv" / "triton"
SERVER = FOLDER / "pytriton" / "tritonserver"
VERSION = "2.51.0 (nvidia-pytriton 0.7.0)"
CACHE_BYTES = 256 << 20  # as large as a router's local tier

# One run for all requests of a batch, with one thread, so that two instances use two cores.
_MODEL = """
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession({path!r}, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, {input!r}).as_numpy() for request in requests]
        rows = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
        (answers,) = self.session.run(None, {{{input!r}: rows}})
        responses, start = [], 0
        for tensor in inputs:
            answer = pb_utils.Tensor({output!r}, answers[start : start + len(tensor)])
            responses.append(pb_utils.InferenceResponse(output_tensors=[answer]))
            start += len(tensor)
        return responses
"""

_CONFIG = """
backend: "python"
input {{ name: "{input}" data_type: TYPE_{datatype} dims: {input_dims} }}
output {{ name: "{output}" data_type: TYPE_FP32 dims: {output_dims} }}
"""


def why_not() -> str:
    """Returns why Triton cannot run here; "" if it can. Fetches it if needed."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "its wheel is for Linux on x86-64"
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        return "its python backend needs a Python with a shared library"
    if not SERVER.exists():
        fetched = subprocess.run([ROOT / "scripts" / "get-triton", FOLDER], capture_output=True, text=True)
        if fetched.returncode:
            return f"scripts/get-triton failed: {fetched.stderr.strip().splitlines()[-1:]}"
    return ""


@contextmanager
def serving(models: list[Model], onnx_files: Path, repository: Path) -> Iterator[Process]:
    """Starts Triton with `models`, whose files are in `onnx_files`; writes Triton's own repository to `repository`."""
    for model in models:
        folder = repository / model.name / "1"
        folder.mkdir(parents=True)
        path = str(onnx_files / model.name / "1" / "model.onnx")
        (folder / "model.py").write_text(_MODEL.format(path=path, input=model.input, output=model.output))
        (folder.parent / "config.pbtxt").write_text(
            _CONFIG.format(
                input=model.input,
                datatype=model.datatype,
                input_dims=list(model.input_dims),
                output=model.output,
                output_dims=list(model.output_dims),
            )
            + CONFIG
        )
    port = free_port()
    process = Process(
        str(SERVER / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={SERVER / 'backends'}",
        f"--cache-directory={SERVER / 'caches'}",
        f"--cache-config=local,size={CACHE_BYTES}",
        f"--grpc-port={port}",
        "--grpc-address=127.0.0.1",
        "--http-address=127.0.0.1",
        f"--http-port={free_port()}",
        f"--metrics-port={free_port()}",
        "--grpc-infer-allocation-pool-size=256",
        port=port,
        environment={
            "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{FOLDER / 'nvidia_pytriton.libs'}",
            # Triton's Python finds its packages by the first python3 on the path.
            "PATH": f"{FOLDER / 'venv' / 'bin'}:{os.environ['PATH']}",
        },
        patience=60,
    )
    # The threads that run models set niceness 0: under `nice -n -20` on a busy machine they had a tenth of their rate.
    process.level_priority()
    try:
        yield process
    finally:
        process.stop()
