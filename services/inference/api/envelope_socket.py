"""A Unix socket at which routers of this host and user hand their envelopes in, as services/runtime/frames.py says."""

from __future__ import annotations  # compiled by mypyc

import asyncio
import logging
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import grpc

from services.inference.worker import Work
from services.runtime import faults
from services.runtime.frames import ANSWER, CALL, CANCEL, FAILURE, LEAVING, FrameError, Frames
from services.runtime.rpc.rpc import Answer, Failure, failure

log = logging.getLogger(__name__)

_PREFIX = "ringmesh-"
_NAME = "envelopes.sock"
# And that of before.
_NAMES = (_NAME, "grpc.sock")
_PROBE_SECONDS = 0.5
# What routers had sent before they heard that they should go elsewhere comes within this.
_LEAVE_SECONDS = 0.5


class Envelopes(Protocol):
    """Answers them: EnvelopeService does."""

    def admit(self, data: bytes) -> Answer | Failure | list[Work]:
        """What cannot be answered at once is for `begin`."""

    def begin(self, works: list[Work], done: Callable[[Answer | Failure], None]) -> Callable[[], None]:
        """What cancels it; `done` hears the answer, later than this returns."""


class EnvelopeSocket:
    """Serves `envelopes`, all on the event loop, in a folder of its own below `folder` that only the owner may enter.

    The name is random: whoever finds a socket there has found this process, and not one of another container that has
    the same folders. Where there is no folder, or none can be made there, nothing is served. Requests above
    `max_message_bytes` are answered RESOURCE_EXHAUSTED.
    """

    def __init__(self, folder: str, envelopes: Envelopes, max_message_bytes: int, count: Callable[[str], None]) -> None:
        """`count` hears the gRPC code that each ended with."""
        self._parent = folder
        self.envelopes = envelopes
        self.count = count
        self.largest = max_message_bytes
        self.connections: set[_Connection] = set()
        self.is_leaving = False
        self._folder: Path | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        """The path; "" where there is none."""
        if not self._parent:
            return ""
        try:
            _remove_stale(Path(self._parent))
            self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._parent))
            path = self._folder / _NAME
            self._server = await asyncio.get_running_loop().create_unix_server(lambda: _Connection(self), path)
            path.chmod(0o600)
        except OSError as error:
            log.warning("no Unix socket in %s, routers come over TCP: %s", self._parent, error)
            if self._server is not None:
                self._server.close()
            self._remove()
            return ""
        return str(path)

    async def stop(self, grace: float) -> None:
        """Asks routers to go elsewhere, waits up to `grace` seconds for what they had sent, then ends the rest."""
        self._remove()
        if self._server is None:
            return
        self._server.close()
        # One that is accepted only now is told when it is.
        self.is_leaving = True
        for connection in self.connections:
            connection.send(LEAVING, 0)
        start = time.monotonic()
        while self.connections and (waited := time.monotonic() - start) < grace:
            if waited > _LEAVE_SECONDS and not any(connection.is_busy for connection in self.connections):
                break  # a router that does not hear
            await asyncio.sleep(_LEAVE_SECONDS / 50)
        for connection in list(self.connections):
            connection.close()

    def _remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Connection(Frames):
    def __init__(self, server: EnvelopeSocket) -> None:
        super().__init__(server.largest)
        self._server = server
        self._envelopes = server.envelopes
        self._count = server.count
        # What cancels each.
        self._under_way: dict[int, Callable[[], None]] = {}

    @property
    def is_busy(self) -> bool:
        """Whether something is under way."""
        return bool(self._under_way) or self.is_sending

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._server.connections.add(self)
        if self._server.is_leaving:
            self.send(LEAVING, 0)

    def take(self, kind: int, number: int, payload: bytes) -> None:
        if kind == CALL:
            if number in self._under_way:
                raise FrameError(f"call {number} twice")
            try:
                admitted = self._envelopes.admit(payload)
                if not isinstance(admitted, Answer | Failure):
                    self._under_way[number] = self._envelopes.begin(admitted, partial(self._done, number))
                    return
            except Exception as error:
                admitted = failure(faults.internal(log, "an envelope failed", error))
            self._answer(number, admitted)
        elif kind == CANCEL:
            self._cancel(number)
        else:
            raise FrameError(f"a frame of kind {kind}, which no caller sends")

    def too_large(self, kind: int, number: int, size: int) -> None:
        if kind != CALL:
            raise FrameError(f"a frame of kind {kind} with {size} bytes")
        message = f"an envelope of {size} bytes; this worker takes {self._largest} at most"
        self._answer(number, Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, message, ()))

    def ended(self, why: str) -> None:
        for number in list(self._under_way):
            self._cancel(number)
        self._server.connections.discard(self)

    def close(self) -> None:
        """Fails what is under way."""
        stopping = Failure(grpc.StatusCode.UNAVAILABLE, "the server is stopping", ())
        for number, cancel in list(self._under_way.items()):
            del self._under_way[number]
            cancel()
            self._answer(number, stopping)
        if self.transport is not None:
            self.transport.close()

    def _cancel(self, number: int) -> None:
        cancel = self._under_way.pop(number, None)
        if cancel is not None:
            cancel()
            self._count("CANCELLED")
        else:
            self.drop_large(number)

    def _done(self, number: int, answer: Answer | Failure) -> None:
        if self._under_way.pop(number, None) is not None:
            self._answer(number, answer)

    def _answer(self, number: int, answer: Answer | Failure) -> None:
        if isinstance(answer, Answer):
            if answer.is_large:
                self.send_large(ANSWER, number, (answer.body, *answer.pieces))
            else:
                self.send(ANSWER, number, answer.body)
            self._count("OK")
        else:
            code: int = answer.code.value[0]
            self.send(FAILURE, number, bytes((code,)) + answer.message.encode())
            self._count(answer.code.name)


def _remove_stale(folder: Path) -> None:
    """What processes of this user left behind when they were killed: nobody listens there."""
    for path in [path for name in _NAMES for path in folder.glob(f"{_PREFIX}*/{name}")]:
        with suppress(OSError):
            status = path.stat()
            if status.st_uid == os.getuid() and stat.S_ISSOCK(status.st_mode) and not _is_listened_on(path):
                path.unlink()
                path.parent.rmdir()


def _is_listened_on(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True
