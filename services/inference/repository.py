"""A model repository in Triton's layout: `<repository>/<model>/<version>/model.onnx`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from services.inference import config
from services.inference.config import ConfigError, ModelConfig

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
    config: ModelConfig | None = None

    @property
    def model(self) -> Path:
        """The ONNX file; what it keeps outside lies beside it."""
        return self.folder / _model_file(self.config)

    @property
    def says_max_batch_size(self) -> bool:
        """Whether its configuration decides on batching."""
        return config.says_max_batch_size(self.folder.parent / CONFIG_FILE)

    def digest(self, provider: str) -> bytes:
        """16 bytes over name, version, every file of the version, the config, and the execution provider."""
        hasher = blake3(f"{len(self.name)}:{self.name}/{self.version}/{provider}\n".encode())
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        config_file = self.folder.parent / CONFIG_FILE
        for path in [*files, *([config_file] if config_file.is_file() else [])]:
            name = str(path.relative_to(self.folder.parent))
            hasher.update(f"{len(name)}:{name}{path.stat().st_size}:".encode())
            hasher.update_mmap(path)
        return hasher.digest(16)


def names(repository: Path) -> list[str]:
    """The models of a repository: its folders. Raises RepositoryError where there is none."""
    if not repository.is_dir():
        raise RepositoryError(f"no model repository at {repository}: there is no such folder")
    try:
        found = sorted(path.name for path in repository.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise RepositoryError(f"cannot read the model repository at {repository}: {error.strerror}") from None
    if not found:
        raise RepositoryError(f"no model in {repository}: it should hold <model>/<version>/{MODEL_FILE}")
    return found


def versions(repository: Path, name: str) -> list[ModelFiles]:
    """The versions of a model that its policy wants, oldest first. Raises RepositoryError where there is none."""
    folder = repository / name
    if Path(name).name != name or not folder.is_dir():
        raise RepositoryError(f"no model {name!r} in {repository}: there is no such folder")
    try:
        found_config = config.read(folder / CONFIG_FILE, name)
        file = _model_file(found_config)
        found = {int(path.name): path for path in folder.iterdir() if path.name.isdecimal() and (path / file).is_file()}
    except ConfigError as error:
        raise RepositoryError(str(error)) from None
    except OSError as error:
        raise RepositoryError(f"cannot read {folder}: {error.strerror}") from None
    wanted = config.wanted_versions(found_config, found)
    if not wanted:
        there = f"; it has {', '.join(map(str, sorted(found)))}" if found else ""
        raise RepositoryError(f"no version of {name!r} to serve: none in {folder} holds {file} and is wanted{there}")
    return [ModelFiles(name, version, found[version], found_config) for version in wanted]


def _model_file(found_config: ModelConfig | None) -> str:
    return (found_config.default_model_filename if found_config is not None else "") or MODEL_FILE
