import time
from types import SimpleNamespace

import numpy as np
import pytest

from services.inference.codec.tensor_spec import TensorSpec
from services.inference.execution.row_independence import why_not_cached
from services.runtime.oip.tensors import DATATYPES


def model(run, *, seconds=0.001, max_batch_rows=64):
    def timed(inputs, _):
        if len(inputs["x"]) == 1:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass
        return [run(inputs["x"])]

    spec = TensorSpec("x", DATATYPES["FP32"], (-1, 3))
    return SimpleNamespace(
        inputs={"x": spec}, required=("x",), outputs={"y": spec}, max_batch_rows=max_batch_rows, run=timed
    )


def doubled(x):
    return x * 2


def last_bits_by_size(x):
    return np.nextafter(x, np.float32(9)) if len(x) > 2 else x


def beside(x):
    return x + x[::-1]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (model(doubled), ""),
        (model(last_bits_by_size), "the last bits of 'y' depend on the size of a batch"),
        (model(last_bits_by_size, max_batch_rows=2), ""),
        (model(beside), "the last bits of 'y' depend on the size of a batch"),
        (model(doubled, seconds=0), "row caching pays from 200 us"),
        (model(doubled, seconds=0.15), "would take long"),
        (model(lambda x: 1 / 0), "a probe of its rows failed: division by zero"),
    ],
    ids=["same bits", "other bits", "never in such a batch", "depends on others", "fast", "slow", "fails"],
)
def test_rows_are_cached_by_themselves_where_it_pays_and_their_bits_are_their_own(made, reason):
    assert reason in why_not_cached(made)
    assert bool(reason) == bool(why_not_cached(made))
