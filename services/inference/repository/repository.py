"""A model repository in Triton's layout: `<repository>/<model>/<version>/model.onnx`."""

from __future__ import annotations

import codecs
import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias

from blake3 import blake3

from services.inference.repository import config
from services.inference.repository.config import ConfigError, ModelConfig
from services.runtime.verdict import YES, Verdict

log = logging.getLogger(__name__)

MODEL_FILE = "model.onnx"
CONFIG_FILE = "config.pbtxt"
# The version's folder in a snapshot.
VERSION = "version"
# Folders of a model that are not versions. Triton can select a configuration from the last one.
_NO_VERSIONS = ("initial_state", "warmup", "configs")

_CHUNK_BYTES = 4 << 20
# The longest file name on Linux file systems, in bytes.
_LONGEST_NAME = 255
_MAX_LABEL_BYTES = 16 << 20
# The most files that a message names.
_MOST_NAMED = 3

# Path, size and a content id of every file of a model. The id changes if the content changes.
Fingerprint: TypeAlias = frozenset[tuple[str, int, int | str]]


class RepositoryError(Exception):
    """The repository cannot be served; the message names the folder and what is missing."""


class NoSuchModelError(RepositoryError):
    """The repository has no model of that name."""


class RepositoryUnavailableError(RepositoryError):
    """The repository cannot be read now, but may be readable later."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """One version of a model on disk, with the `warmup` and `initial_state` folders beside it.

    `origin`: its folder in the repository, for messages. `folder`: the folder that is read. `content`: a hash of 32
    bytes over all files, b"" until `hashed`. `private`: only this installation writes the files, and never in place.
    `labels`: class labels of each output with a label_filename, as read when the model was found.
    """

    name: str
    version: int
    folder: Path
    config: ModelConfig
    origin: Path
    content: bytes = b""
    private: bool = False
    labels: Mapping[str, Sequence[bytes]] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """The ONNX file. Its external data is in the same folder."""
        return _onnx_file(self.folder, _model_file(self.config))

    def size(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def parts(self) -> Iterator[tuple[str, BinaryIO]]:
        """The files, open for reading, each with its name in a snapshot; in the order of these names.

        Files that ONNX Runtime would not read are left out: files that are not regular, and links out of the version's
        folder. Only MODEL_FILE may be one: a configuration, which a caller may send, cannot choose another file.
        Raises OSError.
        """
        for part, folder in (
            ("initial_state", self.folder.parent / "initial_state"),
            (VERSION, self.folder),
            ("warmup", self.folder.parent / "warmup"),
        ):
            within = folder.resolve()
            found = os.walk(folder, onerror=_raise_unless_missing)
            for path in sorted(Path(at, name) for at, _, names in found for name in names):
                with _open(path) as file:
                    # Checks the path of the opened file, because a link may change at any moment.
                    is_model = path == self.folder / MODEL_FILE
                    if file is not None and (is_model or opened_path(file).is_relative_to(within)):
                        yield f"{part}/{path.relative_to(folder)}", file

    def hashed(self) -> ModelFiles:
        hasher = blake3()
        for name, file in self.parts():
            # Reads instead of mapping: a mapped file that is truncated kills the process.
            content = blake3()
            while chunk := file.read(_CHUNK_BYTES):
                content.update(chunk)
            hasher.update(f"{len(name.encode())}:{name}".encode() + content.digest())
        return replace(self, content=hasher.digest())

    def digest(self, provider: str, size: int = 16) -> bytes:
        """A hash of `size` bytes over name, version, content, labels, configuration and execution provider."""
        content = self.content or self.hashed().content
        hasher = blake3(f"{len(self.name)}:{self.name}/{self.version}/{provider}\n".encode())
        hasher.update(content)
        for labels in self.labels.values():
            hasher.update(blake3(b"\n".join(labels)).digest())
        hasher.update(self.config.SerializeToString(deterministic=True))
        return hasher.digest(size)


def opened_path(file: BinaryIO) -> Path:
    """The path of an open file, without links."""
    return Path(f"/proc/self/fd/{file.fileno()}").readlink()


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO | None]:
    """Opens a file; None if it is not a regular file, or a broken link."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # O_NONBLOCK in case it is a pipe
    except FileNotFoundError:
        yield None
        return
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        yield file if stat.S_ISREG(os.fstat(descriptor).st_mode) else None


def data_file(folder: Path, name: str) -> bytes:
    """The content of a file that the configuration names. Raises ConfigError, also if it is outside of `folder`."""
    if not is_file_name(name):
        raise ConfigError(f"names {name!r}; it should be a file of the folder {folder.name}")
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise ConfigError(f"names {folder.name}/{name}, which cannot be read: {error.strerror}") from None


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def is_name(name: str) -> bool:
    return not name.startswith(".") and name.isprintable() and is_file_name(name)


def is_file_name(name: str) -> bool:
    """Whether `name` is a file name without a path, so that it cannot leave its folder."""
    return name not in ("", ".", "..") and not {"/", "\0"} & set(name) and len(name.encode()) <= _LONGEST_NAME


def is_version(name: str) -> bool:
    """Whether `name` can name a version's folder: from 1, below 10^18 and, as in Triton, without leading zeros."""
    return re.fullmatch("[1-9][0-9]{0,17}", name) is not None


class ModelSource(Protocol):
    """A source of models. Its methods may block for long. `private`: fetched files are never written to again."""

    private: bool

    def names(self) -> list[str]:
        """The names of the models. Raises RepositoryError if there are none."""

    def fingerprint(self) -> dict[str, Fingerprint]:
        """The fingerprint of each model; {}: all models were deleted. Raises RepositoryError if the source cannot be
        read, or lists nothing for what may be another reason."""

    def fetch(self, name: str, override: ModelConfig | None) -> Path:
        """A repository folder that holds the current files of the model. `override` replaces its config.pbtxt.

        Raises RepositoryError or ConfigError.
        """


class Directory:
    """A repository in a folder of this machine. Its files may be changed in place."""

    private = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # The device and inode of the folder when it last had models.
        self._identity: tuple[int, int] | None = None

    def names(self) -> list[str]:
        if found := self._names():
            return found
        raise self._has_no_model()

    def _has_no_model(self) -> RepositoryError:
        return RepositoryError(f"no model in {self._folder}: it should hold <model>/<version>/{MODEL_FILE}")

    def _names(self) -> list[str]:
        folder = self._folder
        if not folder.is_dir():
            raise RepositoryError(f"no model repository at {folder}: there is no such folder")
        try:
            found = sorted(path.name for path in folder.iterdir() if path.is_dir() and is_name(path.name))
        except OSError as error:
            raise RepositoryError(f"cannot read the model repository at {folder}: {error.strerror}") from None
        if found and all(is_version(name) and any((folder / name).glob("*.onnx")) for name in found):
            raise RepositoryError(
                f"{folder} is a model; name the repository, the folder that holds it: {folder.parent}"
            )
        return found

    def fingerprint(self) -> dict[str, Fingerprint]:
        """Path, size, modification time and inode of every file, by model."""
        names = self._names()
        try:
            status = self._folder.stat()
        except OSError as error:
            raise RepositoryError(f"cannot read the model repository at {self._folder}: {error.strerror}") from None
        identity = (status.st_dev, status.st_ino)
        # After a mount is lost, the folder is another one: the empty mount point.
        if not names and identity != self._identity:
            raise self._has_no_model()
        self._identity = identity
        return {name: _fingerprint(self._folder / name) for name in names}

    def fetch(self, name: str, override: ModelConfig | None) -> Path:
        return self._folder


def _fingerprint(folder: Path) -> Fingerprint:
    """The fingerprint of a model. Its folders may be links. As in `ModelFiles.parts`, links inside them are not
    followed."""
    found: set[tuple[str, int, int | str]] = set()
    try:
        for top in folder.iterdir():
            walked = os.walk(top, onerror=_raise_unless_missing) if top.is_dir() else ()
            for path in (top, *(Path(at, name) for at, _, names in walked for name in names)):
                # The file may be gone by now, for example a temporary file.
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if stat.S_ISREG(status.st_mode):
                        found.add((str(path), status.st_size, f"{status.st_mtime_ns} {status.st_ino}"))
    except OSError as error:
        # Different at every call, so no two polls agree until the folder can be read.
        return frozenset({(str(error), 0, time.monotonic_ns())})
    return frozenset(found)


def versions(
    repository: Path, name: str, override: ModelConfig | None = None, *, private: bool = False
) -> list[ModelFiles]:
    """The versions of a model that its policy selects, oldest first. Raises RepositoryError if there are none.

    `override` replaces its config.pbtxt.
    """
    folder = repository / name
    if not (is_name(name) and folder.is_dir()):
        raise NoSuchModelError(f"no model {name!r} in {repository}: there is no such folder")
    try:
        found_config = config.read(folder / CONFIG_FILE, name) if override is None else override
        file = _model_file(found_config)
        if not is_file_name(file):
            raise ConfigError(f"{folder}: default_model_filename is {file!r}; it names a file of the version's folder")
        labels = {
            output.name: _labels(folder, output.label_filename)
            for output in found_config.output
            if output.label_filename
        }
        ensemble = found_config.HasField("ensemble_scheduling")
        found: dict[int, Path] = {}
        ignored = []
        for path in sorted(folder.iterdir()):
            if not path.is_dir() or path.name.startswith(".") or path.name in _NO_VERSIONS:
                continue
            if verdict := _is_version_folder(path, "" if ensemble else file):
                found[int(path.name)] = path
            else:
                ignored.append(f"the folder {path.name} is ignored: {verdict.reason}")
                log.warning("model %s: %s", name, ignored[-1])
    except ConfigError as error:
        raise RepositoryError(str(error)) from None
    except OSError as error:
        raise RepositoryError(f"cannot read {folder}: {error.strerror}") from None
    wanted = config.wanted_versions(found_config, found)
    if not wanted:
        if found:
            there = ", ".join(map(str, sorted(found)))
            raise RepositoryError(f"no version of {name!r} to serve: version_policy selects none of {there}")
        if not ensemble and (misplaced := sorted(path.name for path in folder.glob("*.onnx"))):
            raise RepositoryError(
                f"no version of {name!r} to serve: {folder / misplaced[0]} should be {name}/1/{file}, in a folder "
                "named by the version"
            )
        example = "1/" if ensemble else f"1/{file}"
        reason = f"{folder} has no version, such as {example}"
        raise RepositoryError(f"no version of {name!r} to serve: {'; '.join([reason, *ignored[-1:]])}")
    return [
        ModelFiles(name, version, found[version], found_config, origin=found[version], private=private, labels=labels)
        for version in wanted
    ]


def _is_version_folder(folder: Path, file: str) -> Verdict:
    if not is_version(folder.name):
        return Verdict("a version is a whole number from 1, of at most 18 digits, without leading zeros")
    onnx_file = _onnx_file(folder, file)
    if file and not onnx_file.is_file():
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))[:_MOST_NAMED]
        if not others:
            return Verdict(f"it is empty, without {file}")
        file = str(onnx_file.relative_to(folder))
        advice = "rename one, or set default_model_filename" if any(map(_is_onnx, others)) else "only ONNX is served"
        return Verdict(f"it has no {file} but {', '.join(others)}; {advice}")
    if onnx_file != folder / MODEL_FILE and not onnx_file.resolve().is_relative_to(folder.resolve()):
        return Verdict(f"{file} is a link out of it, which only {MODEL_FILE} may be")
    return YES


def _labels(folder: Path, name: str) -> tuple[bytes, ...]:
    """The lines of a label file in the model's folder. Raises ConfigError."""
    try:
        with _open(folder / name) as file:
            if file is None or not opened_path(file).is_relative_to(folder.resolve()):
                raise ConfigError(f"{folder}: label_filename is {name!r}; it names a file in the folder of the model")
            data = bytearray()
            while len(data) <= _MAX_LABEL_BYTES and (chunk := file.read(_CHUNK_BYTES)):
                data += chunk
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{folder}: label_filename is {name!r}, which cannot be read: {cause}") from None
    if len(data) > _MAX_LABEL_BYTES:
        raise ConfigError(f"{folder}: label_filename is {name!r}, which has more than {_MAX_LABEL_BYTES} bytes")
    return tuple(bytes(data).removeprefix(codecs.BOM_UTF8).splitlines())


def _is_onnx(name: str) -> bool:
    return name.endswith(".onnx")


def _onnx_file(folder: Path, name: str) -> Path:
    """As in Triton, `name` may also be a folder that holds MODEL_FILE and its external data."""
    path = folder / name
    return path / MODEL_FILE if path.is_dir() else path


def _model_file(configured: ModelConfig) -> str:
    return configured.default_model_filename or MODEL_FILE
