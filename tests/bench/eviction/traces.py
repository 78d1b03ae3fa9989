"""Traces to replay: keys in request order, with the size and the cost of each key's answer.

There is no public trace of repeated tensor inputs, so three traces are synthetic and one is from block storage.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

# For each kind of answer: share of the keys, median bytes, spread (of the logarithm), median µs of compute, spread.
KINDS = (
    (0.5, 400, 0.5, 300, 0.5),  # a small classifier
    (0.3, 3_500, 0.5, 12_000, 0.4),  # embeddings
    (0.15, 900, 0.4, 60_000, 0.6),  # a ranker with a large model
    (0.05, 150_000, 0.7, 90_000, 0.5),  # masks and images
)
OVERHEAD_BYTES = 500


@dataclass(frozen=True)
class Trace:
    """`keys` index `sizes` (bytes) and `costs` (µs)."""

    keys: np.ndarray
    sizes: np.ndarray
    costs: np.ndarray

    @property
    def footprint(self):
        return int(self.sizes[np.unique(self.keys)].sum())


def answers(count, seed):
    rng = np.random.default_rng(seed)
    kinds = rng.choice(len(KINDS), count, p=[kind[0] for kind in KINDS])
    table = np.array(KINDS)[kinds]
    sizes = rng.lognormal(np.log(table[:, 1]), table[:, 2]).astype(np.int64) + OVERHEAD_BYTES
    costs = rng.lognormal(np.log(table[:, 3]), table[:, 4]).astype(np.int64) + 1
    return sizes, costs


def ranks(exponent, keys, count, rng):
    weights = np.arange(1, keys + 1) ** -exponent
    return np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(count))


def zipf(count, seed=0):
    """Constant popularity: exponent 0.9 over a third as many keys as requests."""
    rng = np.random.default_rng(seed)
    keys = count // 3
    return Trace(rng.permutation(keys)[ranks(0.9, keys, count, rng)], *answers(keys, seed))


def scans(count, seed=1):
    """Half of the requests as in `zipf`; half in long scans: a key occurs once in a scan and again some scans later."""
    rng = np.random.default_rng(seed)
    popular, scanned = count // 6, count // 4
    drawn = rng.permutation(popular)[ranks(0.9, popular, count, rng)]
    run = count // 20
    position = 0
    for index in range(1, 20, 2):
        drawn[index * run : (index + 1) * run] = popular + (position + np.arange(run)) % scanned
        position += run
    return Trace(drawn, *answers(popular + scanned, seed))


def drift(count, seed=2):
    """Changing popularity: each tenth of the trace has its own order of keys, with a gradual transition."""
    rng = np.random.default_rng(seed)
    keys = count // 6
    drawn = ranks(1.0, keys, count, rng)
    phases = 10
    orders = np.array([rng.permutation(keys) for _ in range(phases + 1)])
    place = np.arange(count) * phases / count
    phase = (place + (rng.random(count) < place % 1) * (1 - place % 1)).astype(int)
    return Trace(orders[phase, drawn], *answers(keys, seed))


def from_csv(path: Path, count):
    """Reads libCacheSim's CSV of a block trace: addresses (column 4) and sizes (column 3); costs are drawn as above."""
    rows = np.genfromtxt(path, delimiter=",", skip_header=1, usecols=(4, 3), max_rows=count, dtype=np.int64)
    _, first, keys = np.unique(rows[:, 0], return_index=True, return_inverse=True)
    _, costs = answers(len(first), 3)
    return Trace(keys, rows[first, 1] + OVERHEAD_BYTES, costs)


MADE = {"zipf": zipf, "scans": scans, "drift": drift}
