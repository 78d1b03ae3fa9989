"""Probes whether each row of a loaded model has the same answer in a batch as alone."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from services.inference.codec.tensor_spec import TensorSpec
from services.inference.execution.model import OnnxModel
from services.inference.execution.sessions import first_line
from services.runtime.oip.tensors import encode
from services.runtime.verdict import YES, Verdict

# The batch sizes in which rows are compared with rows alone. Sizes above 8 are used only if the runs are quick.
_SIZES = (2, 3, 5, 8, 16, 32)
_MOST_BATCH_SECONDS = 0.2
# Caching rows that are computed faster than _LEAST_SECONDS does not pay. Probing rows that take longer than
# _MOST_SECONDS would delay the load of the model.
_LEAST_SECONDS = 0.0002
_MOST_SECONDS = 0.1
# The largest row that is probed. A file may declare terabytes.
_MOST_ELEMENTS = 1 << 26


def probed(model: OnnxModel) -> Verdict:
    """Whether batches of two rows agree with the rows alone. Only revokes what the graph proves."""
    try:
        try:
            return _probe(model, lowest_integer=1)
        except Exception:  # the value 2 may be invalid, for example as an index of an embedding
            return _probe(model, lowest_integer=0)
    except Exception as error:
        return Verdict(f"a probe of two rows failed: {first_line(error)}")


def worth_caching(model: OnnxModel, *, asked_for: bool = False) -> Verdict:
    """Whether rows have the same bits alone and in batches of several sizes, and caching pays. `asked_for`: the
    configuration asks for it, so its cost is not checked."""
    names = list(model.outputs)
    try:
        first = {name: _drawn(model.inputs[name], 0, 1) for name in model.required}
        seconds = min(_timed(model, first, names) for _ in range(3))
        if seconds < _LEAST_SECONDS and not asked_for:
            least = f"row caching pays from {_LEAST_SECONDS * 1e6:.0f} us"
            return Verdict(f"computing a row takes {seconds * 1e6:.0f} us; {least}")
        if seconds > _MOST_SECONDS and not asked_for:
            return Verdict(f"a probe of its rows would take long: one is computed in {seconds:.1f} s")
        sizes = [size for size in _SIZES if size <= 8 or size * seconds <= _MOST_BATCH_SECONDS]
        sizes = [size for size in sizes if size <= max(model.max_batch_rows, model.max_request_rows)]
        count = max(sizes, default=1)
        rows = [{name: _drawn(model.inputs[name], row, count) for name in model.required} for row in range(count)]
        alone = [model.compute(row, names) for row in rows]
        for size in sizes:
            # Each row is at another index than in the previous size.
            chosen = [(size + index) % count for index in range(size)]
            batch = {name: np.concatenate([rows[row][name] for row in chosen]) for name in model.required}
            for index, together in enumerate(model.compute(batch, names)):
                apart = np.concatenate([alone[row][index] for row in chosen])
                if apart.shape != together.shape or encode(apart) != encode(together):
                    return Verdict(f"the last bits of {names[index]!r} depend on the size of a batch")
    except Exception as error:
        return Verdict(f"a probe of its rows failed: {first_line(error)}")
    return YES


def free_first_dimension(model: OnnxModel) -> Verdict:
    """Whether no input or output has a fixed first dimension."""
    inputs = (*(model.inputs[name] for name in model.required), *model.hidden_inputs.values())
    for spec in (*inputs, *model.outputs.values(), *model.hidden_outputs.values()):
        if not spec.shape or spec.shape[0] != -1:
            return Verdict(f"the first dimension of {spec.name!r} is not free")
    return YES


def _probe(model: OnnxModel, lowest_integer: int) -> Verdict:
    """Whether two rows in a batch are computed as the rows alone.

    Both orders are tried: a model that sorts or sums along the batch looks independent in one of them. Values are
    near 1 at first, and then have both signs and magnitudes that are far apart.
    """
    names = list(model.outputs)
    for far_apart, tolerance in ((False, 1e-2), (True, 1e-1)):
        rows = [
            {name: _values(model.inputs[name], row, lowest_integer, far_apart) for name in model.required}
            for row in (0, 1)
        ]
        alone = [model.compute(row, names) for row in rows]
        for order in ((0, 1), (1, 0)):
            pair = {name: np.concatenate([rows[row][name] for row in order]) for name in model.required}
            for index, together in enumerate(model.compute(pair, names)):
                expected = [alone[row][index] for row in order]
                if len(together) != 2 or any(len(answer) != 1 for answer in expected):
                    return Verdict(f"{names[index]!r} does not have one row for each row of the inputs")
                if not all(_close(one, together[at : at + 1], tolerance) for at, one in enumerate(expected)):
                    return Verdict(f"a probe found that {names[index]!r} depends on the other rows")
    return YES


def _values(spec: TensorSpec, row: int, lowest_integer: int, far_apart: bool) -> npt.NDArray[Any]:
    """A row for the probe. Rows 0 and 1 differ in every element. The values 0 and 1 are avoided if possible, because
    products with them hide differences."""
    shape = _row_shape(spec, 1)
    dtype = spec.datatype.dtype
    if spec.datatype.itemsize == 0:
        return np.full(shape, b"%d" % row if not far_apart else b"one two three" * row, object)
    if dtype.kind in "biu":
        bits = (np.random.default_rng(0).integers(0, 2, shape) + row) % 2
        return (bits + (lowest_integer if dtype.kind != "b" else 0)).astype(dtype)
    random = np.random.default_rng(row)
    values = random.uniform(0.25, 2, shape)
    if far_apart:
        values *= random.choice((-1, 1), shape) * 1000.0 ** (2 * row - 1)
    return values.astype(dtype)


def _row_shape(spec: TensorSpec, free: int) -> tuple[int, ...]:
    """The shape of one row, with `free` for each free size. Raises ValueError if it is too large to be probed."""
    shape = (1, *(free if size == -1 else size for size in spec.shape[1:]))
    if math.prod(shape) > _MOST_ELEMENTS:
        raise ValueError(f"a row of {spec.name!r} has {math.prod(shape)} elements")
    return shape


def _timed(model: OnnxModel, row: dict[str, npt.NDArray[Any]], names: list[str]) -> float:
    start = time.perf_counter()
    model.compute(row, names)
    return time.perf_counter() - start


def _drawn(spec: TensorSpec, row: int, count: int) -> npt.NDArray[Any]:
    """One of `count` random rows with both signs and magnitudes from 1e-6 to 1e6. Integers are 0 or 1, valid indices of
    any embedding."""
    random = np.random.default_rng(row)
    shape = _row_shape(spec, 4)
    if spec.datatype.itemsize == 0:
        return np.full(shape, b"%d" % row, object)
    if spec.datatype.dtype.kind in "biu":
        return random.integers(0, 2, shape).astype(spec.datatype.dtype)
    magnitude = 10.0 ** (12 * (row + 0.5) / count - 6)
    with np.errstate(over="ignore"):
        drawn: npt.NDArray[Any] = (random.normal(size=shape) * magnitude).astype(spec.datatype.dtype)
    return drawn


def _close(expected: npt.NDArray[Any], got: npt.NDArray[Any], tolerance: float) -> bool:
    if expected.shape != got.shape:
        return False
    if expected.dtype.hasobject or expected.dtype.kind in "biu":
        return bool((expected == got).all())
    expected, got = expected.astype(np.float64), got.astype(np.float64)
    # The tolerance is relative to the largest value. The probabilities of 1000 classes may all be below a fixed one.
    largest = np.abs(expected).max(initial=0, where=np.isfinite(expected))
    return bool(np.allclose(expected, got, rtol=tolerance, atol=tolerance / 10 * largest, equal_nan=True))
