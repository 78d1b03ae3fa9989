"""The workloads: model, request size, repetition, and number of concurrent calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tests.bench.bodies import write_bodies
from tests.bench.models import DENSE, IDENTITY, IMAGE, MAGIKA, MLP, SMALL_IMAGE, Model

ZIPF_KEYS = 10_000
ZIPF_SECONDS = 5


@dataclass(frozen=True)
class Workload:
    """A workload. `kind` hit: always the same body; miss: all bodies differ; zipf: body i with weight 1/i, cold cache.

    `outstanding`: the numbers of concurrent calls. `width` replaces the free dimensions of the model.
    """

    name: str
    title: str
    kind: Literal["hit", "miss", "zipf"]
    model: Model
    outstanding: Sequence[int]
    width: int = 1

    @property
    def order(self) -> str:
        """The load generator's name of the order."""
        return {"hit": "one", "miss": "seq", "zipf": "zipf:1.0"}[self.kind]

    def write_bodies(self, path: Path, rng: np.random.Generator) -> Path:
        """Writes the bodies. Misses need only a few, because the load generator makes each call's body unique."""
        count = {"hit": 1, "miss": 8, "zipf": ZIPF_KEYS}[self.kind]
        return write_bodies(
            path, self.model.name, self.model.input, (self.model.row(rng, self.width) for _ in range(count))
        )


WORKLOADS = [
    Workload("hit", "hit: 8 KB in, 0.9 KB out", "hit", MAGIKA, (1, 16, 64, 1024)),
    Workload("miss", "miss: a tiny MLP", "miss", MLP, (1, 16, 64, 1024)),
    Workload("hit-64KB", "hit: 64 KB in and out", "hit", IDENTITY, (1, 16, 64), width=16_384),
    Workload("miss-64KB", "miss: 64 KB in and out", "miss", IDENTITY, (1, 16, 64), width=16_384),
    Workload("hit-1MB", "hit: 1 MB in and out", "hit", IDENTITY, (1, 16), width=262_144),
    Workload("hit-image", "hit: 600 KB image in, 12 B out", "hit", IMAGE, (1, 16, 64)),
    Workload("miss-image", "miss: 600 KB image in, 12 B out", "miss", IMAGE, (1, 16, 64)),
    Workload("miss-300KB", "miss: 300 KB image in, 12 B out", "miss", SMALL_IMAGE, (1, 16)),
    Workload("miss-dense", "miss: a model that gains from batches", "miss", DENSE, (1, 16, 64, 256)),
    Workload("miss-magika", "miss: magika, 6 ms of a core each", "miss", MAGIKA, (16,)),
    Workload("zipf", "zipf 1.0 over 10,000 magika requests, from cold", "zipf", MAGIKA, (16,)),
]
# The main figures only.
QUICK = {"hit": (1, 16, 64), "miss": (1, 16, 64), "miss-magika": (16,), "zipf": (16,)}
# The workloads by which two trees are compared.
GUARDED = {"hit": (1, 16, 64), "miss": (1, 16, 64)}
