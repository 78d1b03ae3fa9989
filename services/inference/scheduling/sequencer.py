"""Sequences: ordered requests that share the state of a model.

The state of a sequence is kept here and passed to the model with each request. Any instance can therefore run it, and
requests of several sequences can share a batch. The mechanism is Triton's implicit state
(docs/user_guide/implicit_state_management.md of triton-inference-server/server).
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ringmesh.oip.v2 import model_config_pb2 as config_pb2

from services.inference.codec.request import Decoded, SequenceStep
from services.inference.codec.tensor_spec import TensorSpec, agree
from services.inference.execution.model import OnnxModel
from services.inference.repository.config import DEFAULT_IDLE_US, ConfigError
from services.inference.repository.repository import data_file
from services.inference.scheduling.batcher import Batcher, BatchResult
from services.runtime.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    RingmeshError,
)
from services.runtime.oip.tensors import decode

MAX_SEQUENCES = 1 << 14
# Shortest time between two looks for idle sequences.
_LEAST_LOOK_SECONDS = 1.0

Array = npt.NDArray[Any]
_Control = config_pb2.ModelSequenceBatching.Control


class _Sequence:
    """`states`: by the input that takes them. `pending`: number of requests that run or wait for `lock`."""

    __slots__ = ("begun", "lock", "pending", "states", "used")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.states: dict[str, Array] = {}
        self.pending = 0
        self.begun = False
        self.used = 0.0


class Sequencer:
    """Runs requests of a model with sequence_batching through its batcher, one at a time per sequence.

    A sequence begins with sequence_start and ends with sequence_end. It is dropped after it has been idle for
    max_sequence_idle_microseconds (default: 1 s).
    """

    def __init__(self, model: OnnxModel, batcher: Batcher, folder: Path) -> None:
        """`folder`: the model's; its initial_state/ has the files that the configuration names. Raises ConfigError."""
        batching = model.configured.sequence_batching
        self._model = model
        self._batcher = batcher
        self._idle = (batching.max_sequence_idle_microseconds or DEFAULT_IDLE_US) / 1e6
        self._controls = [
            (_control(control, model.hidden_inputs[tensor.name]), tensor.name)
            for tensor in batching.control_input
            for control in tensor.control
        ]
        self._initial = {
            state.input_name: _initial_state(state, model.hidden_inputs[state.input_name], model.has_rows, folder)
            for state in batching.state
        }
        self._state_outputs = tuple([state.output_name for state in batching.state])
        # The sequence that was used least recently comes first.
        self._sequences: OrderedDict[tuple[str, int | str], _Sequence] = OrderedDict()
        # Set while there are any: a caller may never send another request.
        self._look: asyncio.TimerHandle | None = None

    async def submit(self, decoded: Decoded, deadline: float | None) -> BatchResult:
        """As Batcher.submit. Also raises FailedPreconditionError if the sequence did not begin here."""
        step = decoded.sequence
        if step is None:
            raise InvalidArgumentError(
                f"model {self._model.name!r} serves sequences: the request needs the parameter sequence_id, and the "
                "first of a sequence sequence_start",
                field="parameters.sequence_id",
            )
        if decoded.rows != 1:
            raise InvalidArgumentError(
                f"model {self._model.name!r} serves sequences: a request has one row, not {decoded.rows}",
                field="inputs",
            )
        sequence = self._find(step)
        sequence.pending += 1
        try:
            await self._turn(sequence, deadline)
            try:
                if step.start:
                    sequence.states, sequence.begun = self._initial, False
                elif not sequence.begun:
                    raise self._not_begun(step)
                result = await self._run(decoded, step, sequence, deadline)
                sequence.begun = not step.end
                return result
            finally:
                sequence.lock.release()
        finally:
            sequence.pending -= 1
            sequence.used = time.monotonic()
            if not (sequence.begun or sequence.pending):
                del self._sequences[step.key]

    @property
    def waiting(self) -> int:
        return self._batcher.waiting

    async def close(self) -> None:
        while pending := [sequence for sequence in self._sequences.values() if sequence.pending]:
            async with pending[0].lock:
                pass
            await asyncio.sleep(0)
        if self._look is not None:
            self._look.cancel()
        await self._batcher.close()

    def _drop_idle(self) -> None:
        now = time.monotonic()
        while self._sequences:
            oldest_id, oldest = next(iter(self._sequences.items()))
            if oldest.pending or now - oldest.used <= self._idle:
                break
            del self._sequences[oldest_id]

    def _look_later(self) -> None:
        seconds = max(self._idle, _LEAST_LOOK_SECONDS)
        self._look = asyncio.get_running_loop().call_later(seconds, self._look_for_idle)

    def _look_for_idle(self) -> None:
        self._look = None
        self._drop_idle()
        if self._sequences:
            self._look_later()

    def _find(self, step: SequenceStep) -> _Sequence:
        self._drop_idle()
        found = self._sequences.get(step.key)
        if found is None:
            if not step.start:
                raise self._not_begun(step)
            if len(self._sequences) >= MAX_SEQUENCES:
                raise ResourceExhaustedError(
                    f"model {self._model.name!r} has {MAX_SEQUENCES} sequences under way, as many as it may; retry "
                    "later"
                )
            found = self._sequences[step.key] = _Sequence()
            if self._look is None:
                self._look_later()
        self._sequences.move_to_end(step.key)
        return found

    async def _turn(self, sequence: _Sequence, deadline: float | None) -> None:
        """Acquires the lock of a sequence. Raises DeadlineExceededError when the deadline passes."""
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                await sequence.lock.acquire()
        except TimeoutError:
            raise DeadlineExceededError(
                "the deadline passed while the request waited for the one before it in its sequence"
            ) from None

    def _not_begun(self, step: SequenceStep) -> RingmeshError:
        return FailedPreconditionError(
            f"model {self._model.name!r} has no sequence {step.sequence_id!r}: it did not begin with sequence_start, "
            f"has ended, was idle for more than {self._idle:g} s, or its worker was lost; begin it again",
            field="parameters.sequence_id",
        )

    async def _run(
        self, decoded: Decoded, step: SequenceStep, sequence: _Sequence, deadline: float | None
    ) -> BatchResult:
        hidden = {name: control(step) for control, name in self._controls} | sequence.states
        shapes = tuple([state.shape for state in sequence.states.values()])
        whole = Decoded(
            decoded.arrays | hidden,
            decoded.rows,
            (*decoded.outputs, *(name for name in self._state_outputs if name not in decoded.outputs)),
            decoded.classes,
            decoded.regions,
            (decoded.signature, shapes),
            decoded.priority,
            decoded.timeout_us,
            decoded.sequence,
            decoded.trace_context,
        )
        result = await self._batcher.submit(whole, deadline)
        answered = dict(zip(whole.outputs, result.arrays, strict=True))
        # Copies: a view would hold the outputs of the whole batch in memory.
        sequence.states = {
            name: answered[output].copy() for name, output in zip(self._initial, self._state_outputs, strict=True)
        }
        result.arrays = result.arrays[: len(decoded.outputs)]
        return result


def _control(control: _Control, spec: TensorSpec) -> Callable[[SequenceStep], Array]:
    """A function that returns the value of a control input for a step of a sequence."""
    if any(size not in (-1, 1) for size in spec.shape):
        raise ConfigError(f"makes {spec.name!r} a control; it has one element, not the shape {list(spec.shape)}")
    shape = (1,) * len(spec.shape)
    if control.kind == _Control.CONTROL_SEQUENCE_CORRID:
        return lambda step: _correlation_id(step.sequence_id, spec, shape)
    pairs: dict[str, Sequence[float]] = {
        "INT32": control.int32_false_true,
        "FP32": control.fp32_false_true,
        "BOOL": control.bool_false_true,
    }
    pair = pairs.get(spec.datatype.name, ())
    if len(pair) != 2:
        raise ConfigError(
            f"makes {spec.name!r} a control; as it is {spec.datatype.name}, it needs two values in "
            f"{spec.datatype.name.lower()}_false_true, and may be INT32, FP32 or BOOL"
        )
    values = [np.full(shape, value, spec.datatype.dtype) for value in pair]
    if control.kind == _Control.CONTROL_SEQUENCE_START:
        return lambda step: values[step.start]
    if control.kind == _Control.CONTROL_SEQUENCE_END:
        return lambda step: values[step.end]
    return lambda step: values[True]  # READY: nothing is padded here, so every row is a request


def _correlation_id(sequence_id: int | str, spec: TensorSpec, shape: tuple[int, ...]) -> Array:
    if spec.datatype.name == "BYTES":
        return np.full(shape, str(sequence_id).encode(), object)
    try:
        return np.full(shape, sequence_id, spec.datatype.dtype)
    except (ValueError, OverflowError):
        raise InvalidArgumentError(
            f"sequence_id is {sequence_id!r}; the model takes it as {spec.datatype.name}",
            field="parameters.sequence_id",
        ) from None


def _initial_state(
    state: config_pb2.ModelSequenceBatching.State, spec: TensorSpec, batched: bool, folder: Path
) -> Array:
    """The state of a sequence at its start: zeros, unless the configuration names a file."""
    given = state.initial_state[0] if state.initial_state else None
    dims = (*(given.dims if given is not None else state.dims),)
    shape = tuple([1 if size == -1 else size for size in ((1, *dims) if batched else dims)])
    if not agree(shape, spec.shape):
        raise ConfigError(f"gives the state {spec.name!r} dims {list(dims)}; the file has {list(spec.shape)}")
    if given is not None and given.data_file:
        try:
            data = data_file(folder / "initial_state", given.data_file)
            return decode(spec.datatype, shape, data, spec.name)
        except InvalidArgumentError as error:
            raise ConfigError(f"names initial_state/{given.data_file}: {error.message}") from None
    if spec.datatype.dtype.hasobject:
        return np.full(shape, b"", object)
    return np.zeros(shape, spec.datatype.dtype)
