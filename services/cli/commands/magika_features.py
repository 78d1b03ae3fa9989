"""Features of magika's model: the first and last bytes of a file, prepared as the package `magika` 1.0 does.

Follows `Magika._extract_features_from_seekable`: reads up to a block from each end, strips whitespace on the outer
side, cuts to the model's size, and pads on the inner side. Uses only the model and the configuration of that package,
not its code.
"""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.cli.errors import CommandError


@dataclass(frozen=True, slots=True)
class MagikaFeatures:
    """The model's configuration. Sizes are in bytes; `padding` is the token for positions without a byte."""

    begin: int
    end: int
    block: int
    padding: int
    smallest: int
    labels: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path) -> MagikaFeatures:
        """Loads the configuration from the folder that contains the model's `config.min.json`."""
        config = json.loads((folder / "config.min.json").read_text())
        return cls(
            begin=config["beg_size"],
            end=config["end_size"],
            block=config["block_size"],
            padding=config["padding_token"],
            smallest=config["min_file_size_for_dl"],
            labels=tuple(config["target_labels_space"]),
        )

    def extract(self, path: Path) -> NDArray[np.int32] | None:
        """Returns int32 [1, begin + end]; None if the file cannot be read or is too small for the model."""
        try:
            with path.open("rb") as file:
                size = file.seek(0, io.SEEK_END)
                length = min(self.block, size)
                file.seek(0)
                first = file.read(length).lstrip()[: self.begin]
                file.seek(size - length)
                last = file.read(length).rstrip()[-self.end :]
        except OSError:
            return None
        if len(first) < self.smallest:
            return None
        features = np.full((1, self.begin + self.end), self.padding, np.int32)
        features[0, : len(first)] = np.frombuffer(first, np.uint8)
        features[0, features.shape[1] - len(last) :] = np.frombuffer(last, np.uint8)
        return features


def model_folder() -> Path | None:
    """Returns the model's folder in the installed package `magika`; None if it is not installed."""
    spec = importlib.util.find_spec("magika")
    if spec is None or spec.origin is None:
        return None
    models = sorted(Path(spec.origin).parent.glob("models/*/model.onnx"))
    return models[-1].parent if models else None


def require_model_folder() -> Path:
    """Returns the same as `model_folder`. Raises CommandError if it is None."""
    folder = model_folder()
    if folder is None:
        raise CommandError("magika is not installed: pip install 'ringmesh-server[demo]'")
    return folder
