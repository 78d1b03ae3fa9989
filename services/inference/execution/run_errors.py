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
    r"^(?:/onnxruntime_src/\S+:\d+ .*?\)(?: const)?(?: \[with .*?\])?(?:::<lambda\(\)>)? "
    r"|\[ONNXRuntimeError\] : \d+ : \w+ : |[\w./]+\.(?:cc|h|cu):\d+ \w+ |.* was false\. "
    r"|Load model from .*? failed: ?|Fatal error: |Exception during initialization: )"
)
# What to do about failed loads that are common, by a part of ONNX Runtime's message.
_REMEDIES = (
    (re.compile(r"is not a registered function/op"), "libraries of custom operators are not loaded"),
    (
        re.compile(r"construct locale with name:(\S+?):"),
        "the model's StringNormalizer needs the locale {}; install it on this host (Debian: locales-all)",
    ),
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
    status = _message(next(iter(text[node.end() :].strip().splitlines()), ""))
    name = f"node {node['name']!r}" if node["name"] else "a node"
    return f"{name} ({node['operator']}) fails" + (f": {status}" if status else "")


def load_failure(error: Exception) -> str:
    """Why a model was not loaded, in ONNX Runtime's words, and what to do about it, if that is known."""
    message = _message(first_line(error))
    for pattern, remedy in _REMEDIES:
        if found := pattern.search(message):
            return f"{message}; {remedy.format(*found.groups())}"
    return message


def _message(text: str) -> str:
    """The text without the locations in the source of ONNX Runtime."""
    while text != (text := _SOURCE.sub("", text)):
        pass
    return text
