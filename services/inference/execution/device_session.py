"""A session on a GPU, with inputs and outputs bound to memory that the GPU accesses fast.

Inputs and outputs are bound (ONNX Runtime, "I/O Binding"). Outputs are copied through page-locked buffers, which are
reused. With CUDA graphs the kernels of a shape are recorded once and replayed. A replay needs every tensor at its
recorded address (ONNX Runtime, CUDA execution provider, "Using CUDA Graphs"), so each shape keeps its own tensors.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

Array = npt.NDArray[Any]
# The shape that an output will have for these inputs; None if it is only known after the run.
OutputShape = Callable[[str, Mapping[str, Array]], tuple[int, ...] | None]
Allocate = Callable[[tuple[int, ...], Any], onnxruntime.OrtValue]

# Each graph keeps its tensors on the device. Further shapes run without a graph.
MAX_GRAPHS = 16
# Page-locked memory that one session keeps for later runs.
MAX_FREE_BYTES = 256 << 20
_MAX_SHAPES = 1024
_GRAPH_ID = "gpu_graph_id"
_SKIP_GRAPH = "-1"


class DeviceSession:
    """Runs `session` on device number `device`. May be called from several threads."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        device: int,
        dtypes: Mapping[str, npt.DTypeLike],
        output_shape: OutputShape,
        entries: Mapping[str, str],
        *,
        cuda_graphs: bool,
        allocate: Allocate | None,
        device_type: str = "cuda",
    ) -> None:
        """`dtypes`: of all inputs and outputs. `entries`: options of every run. `allocate`: returns memory for outputs
        that both the host and the device can access; None: ONNX Runtime allocates."""
        self._session = session
        self._device = device
        self._device_type = device_type
        self._output_shape = output_shape
        self._dtypes = dtypes
        self._entries = entries
        self._buffers = _PageLockedBuffers(allocate) if allocate is not None else None
        self._graphs: dict[tuple[Any, ...], _Graph] | None = {} if cuda_graphs else None
        # A graph replays on one stream, and all requests with its shape share its tensors.
        self._replaying = threading.Lock()

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        if self._graphs is None:
            return self._run_bound(outputs, feeds, self._entries)
        with self._replaying:
            graph = self._graph(outputs, feeds)
            if graph is None:
                return self._run_bound(outputs, feeds, {**self._entries, _GRAPH_ID: _SKIP_GRAPH})
            return graph.run(self._session, feeds)

    def _run_bound(self, outputs: Sequence[str], feeds: Mapping[str, Array], entries: Mapping[str, str]) -> list[Array]:
        binding = self._session.io_binding()
        for name, array in feeds.items():
            # Not by ascontiguousarray, which makes a vector of a scalar.
            binding.bind_cpu_input(name, np.asarray(array, order="C"))
        buffers: dict[str, onnxruntime.OrtValue] = {}
        for name in outputs:
            shape = self._output_shape(name, feeds)
            if self._buffers is None or shape is None:
                binding.bind_output(name)
            else:
                buffers[name] = self._buffers.take(name, shape, self._dtypes[name])
                binding.bind_ortvalue_output(name, buffers[name])
        try:
            self._session.run_with_iobinding(binding, run_options(entries))
            # Copies, so that the next run can use the buffers immediately.
            return list(binding.copy_outputs_to_cpu())
        finally:
            if self._buffers is not None:
                self._buffers.give_back(buffers)

    def _graph(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> _Graph | None:
        assert self._graphs is not None
        key = (*outputs, *((name, array.shape) for name, array in sorted(feeds.items())))
        graph = self._graphs.get(key)
        if graph is None and len(self._graphs) < MAX_GRAPHS:
            shapes = {name: self._output_shape(name, feeds) for name in outputs}
            known = {name: shape for name, shape in shapes.items() if shape is not None}
            if len(known) == len(shapes):
                graph = self._graphs[key] = _Graph(
                    self._session,
                    run_options({**self._entries, _GRAPH_ID: str(len(self._graphs) + 1)}),
                    {name: self._on_device(name, array.shape) for name, array in feeds.items()},
                    {name: self._on_device(name, shape) for name, shape in known.items()},
                )
        return graph

    def _on_device(self, name: str, shape: tuple[int, ...]) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            shape, self._dtypes[name], self._device_type, self._device
        )


class _Graph:
    """The tensors of one shape, at the addresses that its recorded kernels use."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        options: onnxruntime.RunOptions,
        inputs: Mapping[str, onnxruntime.OrtValue],
        outputs: Mapping[str, onnxruntime.OrtValue],
    ) -> None:
        self._inputs = inputs
        self._binding = session.io_binding()
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options = options

    def run(self, session: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> list[Array]:
        """The first runs record the kernels, later runs replay them."""
        for name, array in feeds.items():
            self._inputs[name].update_inplace(np.asarray(array, order="C"))
        session.run_with_iobinding(self._binding, self._options)
        return list(self._binding.copy_outputs_to_cpu())


class _PageLockedBuffers:
    """Memory for outputs, by name and shape. Keeps up to MAX_FREE_BYTES free, for the most recently used shapes."""

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._lock = threading.Lock()
        # The least recently returned shape comes first.
        self._free: OrderedDict[tuple[str, tuple[int, ...]], list[onnxruntime.OrtValue]] = OrderedDict()
        self.free_bytes = 0

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> onnxruntime.OrtValue:
        with self._lock:
            free = self._free.get((name, shape))
            if free:
                buffer = free.pop()
                self.free_bytes -= buffer.tensor_size_in_bytes()
                return buffer
        return self._allocate(shape, dtype)

    def give_back(self, buffers: Mapping[str, onnxruntime.OrtValue]) -> None:
        with self._lock:
            for name, buffer in buffers.items():
                key = (name, tuple(buffer.shape()))
                self._free.setdefault(key, []).append(buffer)
                self._free.move_to_end(key)
                self.free_bytes += buffer.tensor_size_in_bytes()
            while self.free_bytes > MAX_FREE_BYTES or len(self._free) > _MAX_SHAPES:
                _, dropped = self._free.popitem(last=False)
                self.free_bytes -= sum(buffer.tensor_size_in_bytes() for buffer in dropped)


def run_options(entries: Mapping[str, str]) -> onnxruntime.RunOptions | None:
    if not entries:
        return None
    options = onnxruntime.RunOptions()
    for name, value in entries.items():
        options.add_run_config_entry(name, value)
    return options


def page_locked(provider: str, device: int) -> Allocate | None:
    """Allocates memory that both the host and the GPU can access; None if this machine or build cannot."""
    for found in onnxruntime.get_ep_devices():
        if found.ep_name != provider or found.device.device_id != device:
            continue
        memory = found.memory_info(onnxruntime.OrtDeviceMemoryType.HOST_ACCESSIBLE)
        if memory is not None:
            return partial(onnxruntime.OrtValue.ortvalue_from_shape_and_type, memory_info=memory)
    return None
