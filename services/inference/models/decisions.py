"""Stores operators' decisions about models: the last RepositoryModelLoad or RepositoryModelUnload of each.

Each model has one file, named by the hash of its name, written to a temporary name and renamed. It has a header with a
checksum, followed by a serialized RepositoryModelLoadRequest. Only one worker at a time uses the folder.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3
from google.protobuf.message import DecodeError
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.errors import InvalidArgumentError, ResourceExhaustedError

log = logging.getLogger(__name__)

# Magic number, whether to serve the model, whether the fleet decided, the time, and a hash of the rest and the request.
_HEADER = struct.Struct("<4s??xxQ32s")
_HASHED = struct.Struct("<??Q")
_MAGIC = b"RMD1"
# The size of a small file on disk.
_BLOCK_BYTES = 4096

CONFIG = "config"
FILE = "file:"


@dataclass(frozen=True, slots=True)
class Overrides:
    """The parameters of a load request: a configuration as JSON, and files by `<version>/<name>`."""

    config: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision to serve a model, with the request's overrides, or not to serve it.

    `decided_ns`: time since the Unix epoch. `fleet`: whether a router decided, for all workers.
    """

    loaded: bool
    decided_ns: int
    overrides: Overrides = field(default_factory=Overrides)
    fleet: bool = False


def overrides_of(request: v2.RepositoryModelLoadRequest) -> Overrides:
    """The overrides of a request. Raises InvalidArgumentError for any other parameter."""
    config = ""
    files = {}
    for name, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if name == CONFIG and kind == "string_param":
            config = parameter.string_param
        elif name.startswith(FILE) and kind == "bytes_param":
            files[name.removeprefix(FILE)] = parameter.bytes_param
        else:
            raise InvalidArgumentError(
                f"no parameter {name!r} of that type; there are config (string) and file:<version>/<name> (bytes)",
                field=f"parameters[{name}]",
            )
    return Overrides(config, files)


def request_of(name: str, overrides: Overrides) -> v2.RepositoryModelLoadRequest:
    request = v2.RepositoryModelLoadRequest(model_name=name)
    if overrides.config:
        request.parameters[CONFIG].string_param = overrides.config
    for path, data in overrides.files.items():
        request.parameters[FILE + path].bytes_param = data
    return request


class Decisions:
    """The last decision on each model. Methods that read or write files may block for long.

    `decided_ns`: time of the decision, by model. `fleet`: models whose last decision was the fleet's. `brought`: models
    whose last decision includes files.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """`limit`: total bytes of all files. Raises OSError if the folder cannot be used or another worker uses it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._limit = limit
        self._lock = (folder / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._sizes: dict[str, int] = {}
        self.fleet: set[str] = set()
        self.brought: set[str] = set()
        self.decided_ns: dict[str, int] = {}
        for path in folder.iterdir():
            if path.suffix == ".partial":
                path.unlink()
            elif path.name != "lock":
                self._sizes[path.name] = _size(path.stat().st_size)
                if read := _read(path):
                    self._remember(*read)

    @property
    def size(self) -> int:
        return sum(self._sizes.values())

    def get(self, name: str) -> Decision | None:
        """The decision on a model; None if there is none, or its file is damaged."""
        read = _read(self._folder / _file(name)) if name in self.decided_ns else None
        return read[1] if read is not None else None

    def next_ns(self, name: str) -> int:
        """The time for a decision made now. It is later than the last decision's, whatever the clock says."""
        return max(time.time_ns(), self.decided_ns.get(name, 0) + 1)

    def keep(self, name: str, decision: Decision) -> None:
        """Stores a decision durably. Raises ResourceExhaustedError; the previous decision then remains."""
        request = request_of(name, decision.overrides).SerializeToString()
        fields = (decision.loaded, decision.fleet, decision.decided_ns)
        header = _HEADER.pack(_MAGIC, *fields, blake3(_HASHED.pack(*fields)).update(request).digest())
        file = _file(name)
        size = _size(len(header) + len(request))
        total = self.size - self._sizes.get(file, 0) + size
        if total > self._limit:
            raise ResourceExhaustedError(
                f"what was loaded and unloaded by request would take {total} bytes, and RINGMESH_DECISIONS_BYTES is "
                f"{self._limit}; load models without a configuration and files of their own, or raise it",
                kind="decisions",
            )
        try:
            self._write(file, header, request)
        except OSError as error:
            raise ResourceExhaustedError(
                f"cannot write to {self._folder}: {error.strerror}", kind="decisions"
            ) from None
        self._sizes[file] = size
        self._remember(name, decision)

    def close(self) -> None:
        self._lock.close()

    def _remember(self, name: str, decision: Decision) -> None:
        self.decided_ns[name] = decision.decided_ns
        (self.fleet.add if decision.fleet else self.fleet.discard)(name)
        (self.brought.add if decision.overrides.files else self.brought.discard)(name)

    def _write(self, file: str, header: bytes, request: bytes) -> None:
        partial = self._folder / f"{file}.partial"
        try:
            with partial.open("wb") as written:
                written.write(header)
                written.write(request)
                written.flush()
                os.fsync(written.fileno())
            partial.replace(self._folder / file)
        finally:
            partial.unlink(missing_ok=True)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(path: Path) -> tuple[str, Decision] | None:
    try:
        data = path.read_bytes()
        magic, *fields, hashed = _HEADER.unpack_from(data)
        request = memoryview(data)[_HEADER.size :]
        if magic != _MAGIC or blake3(_HASHED.pack(*fields)).update(request).digest() != hashed:
            raise ValueError("its checksum is wrong")
        message = v2.RepositoryModelLoadRequest.FromString(bytes(request))
        if path.name != _file(message.model_name):
            raise ValueError("it has the name of another model's file")
        loaded, fleet, decided_ns = fields
        return message.model_name, Decision(loaded, decided_ns, overrides_of(message), fleet)
    except (OSError, ValueError, struct.error, DecodeError, InvalidArgumentError) as error:
        log.error("%s is ignored, and with it what was decided about a model: %s", path, error)
        return None


def _file(name: str) -> str:
    return blake3(name.encode()).hexdigest()


def _size(size: int) -> int:
    return max(size, _BLOCK_BYTES)
