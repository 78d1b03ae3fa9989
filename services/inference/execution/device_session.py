"""A session whose model lies on a GPU: what the host gives and gets is bound to memory that the GPU reaches fast.

Inputs and outputs are bound (ONNX Runtime, "I/O Binding"). Outputs leave through page-locked buffers that are
used again. With CUDA graphs the kernels of a shape are recorded once and replayed, which needs every tensor at the
address it had (ONNX Runtime, CUDA execution provider, "Using CUDA Graphs"); so each shape keeps tensors of its own.
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
# Which shape an output will have for these inputs; None where only the run can tell.
OutputShape = Callable[[str, Mapping[str, Array]], tuple[int, ...] | None]
Allocate = Callable[[tuple[int, ...], Any], onnxruntime.OrtValue]

# Each keeps its tensors on the device; what comes in more shapes than this runs the usual way.
MAX_GRAPHS = 16
# Page-locked memory that waits for the next run, of one session.
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
        """`dtypes` of all inputs and outputs; `entries` go into the options of every run. `allocate` gives memory for
        outputs that the host and the device both reach; None: ONNX Runtime's own."""
        self._session = session
        self._device = device
        self._device_type = device_type
        self._output_shape = output_shape
        self._dtypes = dtypes
        self._entries = entries
        self._buffers = _PageLockedBuffers(allocate) if allocate is not None else None
        self._graphs: dict[tuple[Any, ...], _Graph] | None = {} if cuda_graphs else None
        # A graph replays on one stream, and its tensors are shared by all who come with its shape.
        self._replaying = threading.Lock()

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """Outputs in the order asked, on the host."""
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
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
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
            # Copies, so that the buffers can serve the next run at once.
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
    """The tensors of one shape, at the addresses that its recorded kernels know."""

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
        """The first runs record, the later replay."""
        for name, array in feeds.items():
            self._inputs[name].update_inplace(np.ascontiguousarray(array))
        session.run_with_iobinding(self._binding, self._options)
        return list(self._binding.copy_outputs_to_cpu())


class _PageLockedBuffers:
    """Memory for outputs, by name and shape: at most MAX_FREE_BYTES wait to be used again, of the last shapes."""

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._lock = threading.Lock()
        # The shape that was given back longest ago comes first.
        self._free: OrderedDict[tuple[str, tuple[int, ...]], list[onnxruntime.OrtValue]] = OrderedDict()
        self.free_bytes = 0

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> onnxruntime.OrtValue:
        """One that nobody uses now."""
        with self._lock:
            free = self._free.get((name, shape))
            if free:
                buffer = free.pop()
                self.free_bytes -= buffer.tensor_size_in_bytes()
                return buffer
        return self._allocate(shape, dtype)

    def give_back(self, buffers: Mapping[str, onnxruntime.OrtValue]) -> None:
        """For the next run of their shape."""
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
    """None where there is nothing to say."""
    if not entries:
        return None
    options = onnxruntime.RunOptions()
    for name, value in entries.items():
        options.add_run_config_entry(name, value)
    return options


def page_locked(provider: str, device: int) -> Allocate | None:
    """How to get memory that the host and the GPU both reach; None where this machine or build has no way."""
    for found in onnxruntime.get_ep_devices():
        if found.ep_name != provider or found.device.device_id != device:
            continue
        memory = found.memory_info(onnxruntime.OrtDeviceMemoryType.HOST_ACCESSIBLE)
        if memory is not None:
            return partial(onnxruntime.OrtValue.ortvalue_from_shape_and_type, memory_info=memory)
    return None
