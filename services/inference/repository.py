"""A model repository in Triton's layout: `<repository>/<model>/<version>/model.onnx`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

MODEL_FILE = "model.onnx"
CONFIG_FILE = "config.pbtxt"


class RepositoryError(Exception):
    """The repository cannot be served; the message names the folder and what is missing."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """One version of a model on disk."""

    name: str
    version: int
    folder: Path

    @property
    def model(self) -> Path:
        """The ONNX file; what it keeps outside lies beside it."""
        return self.folder / MODEL_FILE

    def digest(self, provider: str) -> bytes:
        """16 bytes over name, version, every file of the version, the config, and the execution provider."""
        hasher = blake3(f"{len(self.name)}:{self.name}/{self.version}/{provider}\n".encode())
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        config = self.folder.parent / CONFIG_FILE
        for path in [*files, *([config] if config.is_file() else [])]:
            name = str(path.relative_to(self.folder.parent))
            hasher.update(f"{len(name)}:{name}{path.stat().st_size}:".encode())
            hasher.update_mmap(path)
        return hasher.digest(16)


def scan(repository: Path) -> list[ModelFiles]:
    """Every version of every model, by name and version. Raises RepositoryError where there is none."""
    if not repository.is_dir():
        raise RepositoryError(f"no model repository at {repository}: there is no such folder")
    try:
        found = [
            ModelFiles(model.name, int(version.name), version)
            for model in repository.iterdir()
            if model.is_dir()
            for version in model.iterdir()
            if version.name.isdecimal() and (version / MODEL_FILE).is_file()
        ]
    except OSError as error:
        raise RepositoryError(f"cannot read the model repository at {repository}: {error.strerror}") from None
    if not found:
        raise RepositoryError(f"no model in {repository}: it should hold <model>/<version>/{MODEL_FILE}")
    return sorted(found, key=lambda files: (files.name, files.version))
