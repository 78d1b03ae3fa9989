"""Maps errors of ONNX Runtime to the errors that callers get, by whose fault they are.

ONNX Runtime 1.32 raises InvalidArgument for some checks of a node's inputs, and Fail or RuntimeException for most. A
node that fails on the host fails because of the values or shapes of its inputs, unless memory is short. A device may
also fail by itself.
"""

from __future__ import annotations

import logging
import re

import onnxruntime

from services.inference.execution.sessions import first_line
from services.runtime import faults
from services.runtime.errors import InternalError, InvalidArgumentError, ResourceExhaustedError, RingmeshError
from services.runtime.machine.machine_fault import machine_fault

log = logging.getLogger(__name__)

_STATE = onnxruntime.capi.onnxruntime_pybind11_state
_NODE = re.compile(r"while running (?P<operator>\S+) node\. Name:'(?P<name>[^']*)' Status Message:")
_MEMORY = re.compile(r"requested buffer of size (\d+)")
_DEVICE = re.compile(r"\b(cuda|cudnn|cublas|cufft|nccl|tensorrt|trt|openvino|hip|miopen|rocblas)", re.IGNORECASE)
# The location in the source of ONNX Runtime, which precedes the message.
_SOURCE = re.compile(
    r"^(?:/onnxruntime_src/\S+:\d+ .*?\)(?: const)?(?: \[with .*?\])? |\[ONNXRuntimeError\] : \d+ : \w+ : "
    r"|[\w./]+\.(?:cc|h|cu):\d+ \w+ |.* was false\. )"
)


def run_error(model: str, error: Exception) -> RingmeshError:
    """InvalidArgumentError if the inputs were refused, ResourceExhaustedError if memory was short, else InternalError.
    Logs unexpected failures."""
    if lacks := machine_fault(error):
        found = _MEMORY.search(str(error))
        wanted = f"{found[1]} bytes" if found is not None else lacks
        return ResourceExhaustedError(
            f"model {model!r} needs more memory for this request than this worker has: {wanted}", kind="memory"
        )
    if isinstance(error, UnicodeDecodeError):
        return InternalError(
            f"model {model!r} answers with a string that is not UTF-8, as all strings of ONNX are: {error.reason}",
            kind="execution",
        )
    if refused := _refusal(error):
        return InvalidArgumentError(f"model {model!r} cannot run on these inputs: {refused}", field="inputs")
    faults.internal(log, f"model {model} failed", error)
    return InternalError(
        f"model {model!r} failed in ONNX Runtime ({type(error).__name__}); the worker's log has the cause",
        kind="execution",
    )


def _refusal(error: Exception) -> str:
    """Why the inputs were refused, in ONNX Runtime's words; "" if it does not say so."""
    text = str(error)
    # The last node is the innermost if graphs of If, Loop or Scan are nested.
    nodes = list(_NODE.finditer(text))
    if not nodes:
        return first_line(error) if isinstance(error, _STATE.InvalidArgument) else ""
    if not isinstance(error, _STATE.InvalidArgument | _STATE.Fail | _STATE.RuntimeException) or _DEVICE.search(text):
        return ""
    node = nodes[-1]
    status = next(iter(text[node.end() :].strip().splitlines()), "")
    while status != (status := _SOURCE.sub("", status)):
        pass
    name = f"node {node['name']!r}" if node["name"] else "a node"
    return f"{name} ({node['operator']}) fails" + (f": {status}" if status else "")
