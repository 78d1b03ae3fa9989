"""A model repository in Triton's layout: `<repository>/<model>/<version>/model.onnx`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from blake3 import blake3

from services.inference import config
from services.inference.config import ConfigError, Configured

MODEL_FILE = "model.onnx"
CONFIG_FILE = "config.pbtxt"

# Every file of a model: its path, its size, and what is another when its content is.
Fingerprint: TypeAlias = frozenset[tuple[str, int, int | str]]


class RepositoryError(Exception):
    """The repository cannot be served; the message names the folder and what is missing."""


class RepositoryUnavailableError(RepositoryError):
    """It cannot be read now, and may be later."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """One version of a model on disk."""

    name: str
    version: int
    folder: Path
    config: Configured

    @property
    def model(self) -> Path:
        """The ONNX file; what it keeps outside lies beside it."""
        return self.folder / _model_file(self.config)

    def size(self) -> int:
        """Bytes of all files of the version."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def digest(self, provider: str) -> bytes:
        """16 bytes over name, version, every file of the version, the config, and the execution provider."""
        hasher = blake3(f"{len(self.name)}:{self.name}/{self.version}/{provider}\n".encode())
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        for path in files:
            name = str(path.relative_to(self.folder))
            hasher.update(f"{len(name)}:{name}{path.stat().st_size}:".encode())
            hasher.update_mmap(path)
        hasher.update(self.config.message.SerializeToString(deterministic=True))
        return hasher.digest(16)


def is_name(name: str) -> bool:
    """Whether it can be the name of a model, which is that of a folder."""
    return bool(name) and not name.startswith(".") and Path(name).name == name


class ModelSource(Protocol):
    """Where models come from. Its methods may take long."""

    def names(self) -> list[str]:
        """The models. Raises RepositoryError where there is none."""

    def fingerprint(self) -> dict[str, Fingerprint]:
        """What the models are made of; {} where it cannot be read."""

    def fetch(self, name: str, override: Configured | None) -> Path:
        """A folder that holds the model as it is now; `override` takes the place of its config.pbtxt.

        Raises RepositoryError or ConfigError.
        """


class Directory:
    """A repository in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Its folders. Raises RepositoryError where there is none."""
        folder = self._folder
        if not folder.is_dir():
            raise RepositoryError(f"no model repository at {folder}: there is no such folder")
        try:
            found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError as error:
            raise RepositoryError(f"cannot read the model repository at {folder}: {error.strerror}") from None
        if not found:
            raise RepositoryError(f"no model in {folder}: it should hold <model>/<version>/{MODEL_FILE}")
        return found

    def fingerprint(self) -> dict[str, Fingerprint]:
        """Path, size and time of change of every file, by model; {} where it cannot be read."""
        try:
            return {
                name: frozenset(
                    (str(path), path.stat().st_size, path.stat().st_mtime_ns)
                    for path in (self._folder / name).rglob("*")
                    if path.is_file()
                )
                for name in self.names()
            }
        except (OSError, RepositoryError):
            return {}

    def fetch(self, name: str, override: Configured | None) -> Path:
        """The folder itself."""
        return self._folder


def versions(repository: Path, name: str, override: Configured | None = None) -> list[ModelFiles]:
    """The versions of a model that its policy wants, oldest first. Raises RepositoryError where there is none.

    `override` takes the place of its config.pbtxt.
    """
    folder = repository / name
    if not (is_name(name) and folder.is_dir()):
        raise RepositoryError(f"no model {name!r} in {repository}: there is no such folder")
    try:
        found_config = override or config.read(folder / CONFIG_FILE, name)
        file = _model_file(found_config)
        ensemble = found_config.message.HasField("ensemble_scheduling")
        found = {
            int(path.name): path
            for path in folder.iterdir()
            if path.name.isdecimal() and (path.is_dir() if ensemble else (path / file).is_file())
        }
    except ConfigError as error:
        raise RepositoryError(str(error)) from None
    except OSError as error:
        raise RepositoryError(f"cannot read {folder}: {error.strerror}") from None
    wanted = config.wanted_versions(found_config.message, found)
    if not wanted:
        there = f"; it has {', '.join(map(str, sorted(found)))}" if found else ""
        wanting = "is a folder (empty, for an ensemble)" if ensemble else f"holds {file}"
        raise RepositoryError(f"no version of {name!r} to serve: none in {folder} {wanting} and is wanted{there}")
    return [ModelFiles(name, version, found[version], found_config) for version in wanted]


def _model_file(configured: Configured) -> str:
    return configured.message.default_model_filename or MODEL_FILE
