"""The ONNX Runtime sessions of one model: one on the CPU, or one on each of its GPUs."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime

from services.inference.codec.tensor_spec import UnservableError, datatype_of
from services.inference.execution import execution
from services.inference.execution.device_session import DeviceSession, OutputShape, page_locked, run_options
from services.inference.execution.execution import Execution
from services.inference.repository.config import ConfigError
from services.inference.repository.repository import ModelFiles
from services.runtime.oip.tensors import DATATYPES

log = logging.getLogger(__name__)

_ONNX_BFLOAT16 = 16
# A tensor above this size makes ONNX Runtime's arena grow.
_LARGE_BYTES = 8 << 20
_MOST_ZEROS = 64 << 20
_SHRINK = {"memory.enable_memory_arena_shrinkage": "cpu:0"}

Arrays = list[npt.NDArray[Any]]


class InferenceSessions:
    """Runs a model on the devices of its configuration, as far as this machine has them. Safe for several threads.

    `provider`: the first execution provider in use. With several GPUs, a run takes the one with the fewest runs in
    flight.
    """

    def __init__(
        self,
        files: ModelFiles,
        available: Sequence[str],
        threads: int,
        output_shape: OutputShape,
        caches: str,
    ) -> None:
        """`available`: the execution providers of this machine. `threads`: of concurrent runs together. `caches`:
        folder for TensorRT's engines. Raises ConfigError, and the errors of ONNX Runtime."""
        options = execution.session_options(files.config, threads)
        executions = execution.executions(files.config, available, caches)
        sessions = [_open(files.model, options, chosen.providers) for chosen in executions]
        first = sessions[0]
        self.inputs = first.get_inputs()
        self.outputs = first.get_outputs()
        self.initializers = first.get_overridable_initializers()
        self.provider: str = first.get_providers()[0]
        if self.provider == execution.CPU:
            # Without GPUs, the sessions for the GPUs would all use the same cores. One is enough.
            del sessions[1:], executions[1:]
        if any(session.get_providers()[0] != self.provider for session in sessions):
            raise ConfigError("names GPUs in instance_group that are not all to be had here")
        wanted = executions[0].providers[0][0]
        # ONNX Runtime leaves out a provider whose libraries do not load.
        if missing := {*executions[0].missing, wanted} - {self.provider}:
            lacks = ", ".join(sorted(missing))
            log.warning("model %s/%d: it runs on %s, without %s", files.name, files.version, self.provider, lacks)
        entries = execution.run_entries(files.config)
        self._runners = [
            _runner(session, chosen, entries, output_shape)
            for session, chosen in zip(sessions, executions, strict=True)
        ]
        self._running = [0] * len(self._runners)
        self._choosing = threading.Lock()
        self._arena = _Arena(first) if self.provider == execution.CPU else None
        # The outputs of large runs since the arena was last shrunk; None if there were no large runs.
        self._large: list[weakref.ref[npt.NDArray[Any]]] | None = None

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> Arrays:
        """Runs the model without the GIL. Returns the outputs in the requested order. Raises the errors of ONNX
        Runtime."""
        if len(self._runners) == 1:
            arrays = self._runners[0].run(outputs, feeds)
            for array in (*arrays, *feeds.values()):
                if array.nbytes > _LARGE_BYTES:
                    self._watch_large(arrays)
                    break
            return arrays
        with self._choosing:
            chosen = self._running.index(min(self._running))
            self._running[chosen] += 1
        try:
            return self._runners[chosen].run(outputs, feeds)
        finally:
            with self._choosing:
                self._running[chosen] -= 1

    def _watch_large(self, arrays: Arrays) -> None:
        with self._choosing:
            held = [ref for ref in self._large or () if ref() is not None]
            self._large = held + [weakref.ref(array) for array in arrays]

    def shrink(self) -> None:
        """On a thread: frees memory that large runs left in ONNX Runtime's arena, once their outputs are freed."""
        with self._choosing:
            if self._arena is None or self._large is None or any(ref() is not None for ref in self._large):
                return
            self._large = None
        self._arena.shrink()


def _open(
    file: Path, options: onnxruntime.SessionOptions, providers: Sequence[tuple[str, Mapping[str, str]]]
) -> onnxruntime.InferenceSession:
    """Opens a session with the first of `providers` that this machine can start, and the providers after it.

    ONNX Runtime's own fallback is off. It would lose the options of the other providers. After a failed run it would
    also switch to another provider, whose answers do not belong to this digest.
    """
    try:
        return onnxruntime.InferenceSession(file, options, providers=[*providers], enable_fallback=0)
    except Exception as error:
        if len(providers) == 1:
            raise
        log.warning("%s: cannot start %s: %s", file, providers[0][0], first_line(error))
        return _open(file, options, providers[1:])


def _runner(
    session: onnxruntime.InferenceSession, chosen: Execution, entries: Mapping[str, str], output_shape: OutputShape
) -> DeviceSession | _HostSession:
    nodes = (*session.get_inputs(), *session.get_overridable_initializers(), *session.get_outputs())
    datatypes = {node.name: datatype_of(node) for node in nodes}
    names = {datatype.name for datatype in datatypes.values() if datatype is not None}
    if "BF16" in names:
        if strings := [node.name for node in session.get_inputs() if datatypes[node.name] == DATATYPES["BYTES"]]:
            # Its bindings take an OrtValue for bfloat16, and make none of strings.
            raise UnservableError(f"it takes {strings[0]!r} as strings beside bfloat16, which ONNX Runtime cannot bind")
        return _Bfloat16Session(session, entries)
    provider = session.get_providers()[0]
    if chosen.device is None or provider == execution.CPU or None in datatypes.values() or "BYTES" in names:
        return _HostSession(session, entries)
    return DeviceSession(
        session,
        chosen.device,
        {name: datatype.dtype for name, datatype in datatypes.items() if datatype is not None},
        output_shape,
        entries,
        cuda_graphs=chosen.cuda_graphs,
        allocate=page_locked(provider, chosen.device) if chosen.pinned_outputs else None,
    )


class _Arena:
    """The CPU memory that ONNX Runtime keeps for a session, in regions. ONNX Runtime never frees the first region.

    A run on the smallest possible inputs therefore makes the first region. Shrinking needs a run too, which is
    terminated before its first node.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]
        self._run(run_options({}))

    def shrink(self) -> None:
        if (options := run_options(_SHRINK)) is not None:
            options.terminate = True
            self._run(options)

    def _run(self, options: onnxruntime.RunOptions | None) -> None:
        feeds = _smallest(self._session)
        if feeds is not None:
            # The run fails if it is terminated, or if the model does not accept such small inputs.
            with contextlib.suppress(Exception):
                self._session.run(self._outputs, feeds, options)


def _smallest(session: onnxruntime.InferenceSession) -> dict[str, Any] | None:
    """Zeros for each input, with size 1 for free dimensions; None if an input cannot be made or is too large."""
    feeds: dict[str, Any] = {}
    size = 0
    for node in session.get_inputs():
        datatype = datatype_of(node)
        if datatype is None or datatype.name == "BF16":
            return None
        shape = [dim if isinstance(dim, int) and dim >= 0 else 1 for dim in node.shape]
        size += math.prod(shape) * datatype.dtype.itemsize
        if size > _MOST_ZEROS:
            return None
        feeds[node.name] = np.full(shape, "", object) if datatype.dtype.hasobject else np.zeros(shape, datatype.dtype)
    return feeds


class _HostSession:
    """A session with inputs and outputs in the memory of this process."""

    def __init__(self, session: onnxruntime.InferenceSession, entries: Mapping[str, str]) -> None:
        self._session = session
        self._options = run_options(entries)

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> Arrays:
        arrays: Arrays = self._session.run(outputs, feeds, self._options)
        return arrays


class _Bfloat16Session(_HostSession):
    """A session with bfloat16 tensors. NumPy lacks bfloat16 and ONNX Runtime's bindings refuse the one of ml_dtypes, so
    the bits are passed as uint16 and read by address."""

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> Arrays:
        make = onnxruntime.OrtValue
        values = {
            name: make.ortvalue_from_numpy_with_onnx_type(np.asarray(array, order="C").view(np.uint16), _ONNX_BFLOAT16)
            if array.dtype == ml_dtypes.bfloat16
            else make.ortvalue_from_numpy(array)
            for name, array in feeds.items()
        }
        arrays = []
        for value in self._session.run_with_ort_values(outputs, values, self._options):
            if value.data_type() != "tensor(bfloat16)":
                arrays.append(value.numpy())
                continue
            data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
            arrays.append(np.frombuffer(data, ml_dtypes.bfloat16).reshape(value.shape()))
        return arrays


def first_line(error: Exception) -> str:
    """The first line of ONNX Runtime's message; details follow it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
