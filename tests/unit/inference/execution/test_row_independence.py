import time
from types import SimpleNamespace

import numpy as np
import pytest

from services.inference.codec.tensor_spec import TensorSpec
from services.inference.execution.row_independence import worth_caching
from services.runtime.oip.tensors import DATATYPES


def model(run, *, seconds=0.001, max_batch_rows=64, max_request_rows=0):
    def timed(inputs, _):
        if len(inputs["x"]) == 1:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass
        return [run(inputs["x"])]

    spec = TensorSpec("x", DATATYPES["FP32"], (-1, 3))
    return SimpleNamespace(
        inputs={"x": spec},
        required=("x",),
        outputs={"y": spec},
        max_batch_rows=max_batch_rows,
        max_request_rows=max_request_rows,
        compute=timed,
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
    verdict = worth_caching(made)
    assert reason in verdict.reason
    assert bool(reason) != bool(verdict)


@pytest.mark.parametrize("seconds", [0, 0.11], ids=["quick", "slow"])
def test_rows_that_are_asked_for_are_probed_whatever_they_take(seconds):
    assert worth_caching(model(doubled, seconds=seconds, max_batch_rows=2), asked_for=True)
    other = model(lambda x: last_bits_by_size(np.concatenate((x, x)))[: len(x)], seconds=seconds, max_batch_rows=2)
    assert "the last bits of 'y'" in worth_caching(other, asked_for=True).reason


def test_rows_of_requests_that_are_never_joined_are_probed_in_batches_as_large_as_a_request():
    made = model(last_bits_by_size, max_batch_rows=1, max_request_rows=8)
    assert "the last bits of 'y'" in worth_caching(made, asked_for=True).reason
