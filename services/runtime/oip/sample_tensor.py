"""Sample tensors of a given datatype and shape, for trial requests."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from services.runtime.oip import tensors

WORDS = ("random", "zeros", "ones")


def fill(word: str, datatype: str, shape: Sequence[int]) -> npt.NDArray[Any]:
    """Fills a tensor by one of WORDS; BYTES get short texts. Raises InvalidArgumentError for an unknown datatype."""
    dtype = tensors.datatype(datatype, "").dtype
    if dtype.kind == "O":
        texts = ["0" if word == "zeros" else f"text {random.randrange(1000)}" for _ in range(math.prod(shape))]
        return np.array([text.encode() for text in texts], object).reshape(shape)
    if word != "random":
        return (np.zeros if word == "zeros" else np.ones)(shape, dtype)
    generator = np.random.default_rng()
    if dtype.kind in "biu":
        return generator.integers(0, 2 if dtype.kind == "b" else 100, shape).astype(dtype)
    return generator.standard_normal(shape).round(3).astype(dtype)
