"""A Unix socket for envelopes from routers of this host and user; services/runtime/frames.py defines the frames."""

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

import grpc

from services.runtime import faults
from services.runtime.driver import Driver
from services.runtime.frames import ANSWER, CALL, CANCEL, FAILURE, LEAVING, FrameConnection, FrameError
from services.runtime.rpc.rpc import Answer, Failure, FastPath, failure

log = logging.getLogger(__name__)

_PREFIX = "ringmesh-"
_NAME = "envelopes.sock"
# Includes the name that earlier versions used.
_NAMES = (_NAME, "grpc.sock")
_PROBE_SECONDS = 0.5
# Envelopes that routers sent before they received LEAVING arrive within this time.
_LEAVE_SECONDS = 0.5


class EnvelopeSocket:
    """Serves envelopes on the event loop. The socket has its own folder below `folder`, which only the owner may enter.

    The folder's name is random, so its socket always belongs to this process and not to another container with the same
    folders. Nothing is served if `folder` is "" or the socket cannot be created. Envelopes above `max_message_bytes`
    are answered RESOURCE_EXHAUSTED.
    """

    def __init__(self, folder: str, path: FastPath, max_message_bytes: int, count: Callable[[str], None]) -> None:
        """`path` answers an envelope; `count` is called with the gRPC code of each answer."""
        self._parent = folder
        self.path = path
        self.count = count
        self.largest = max_message_bytes
        self.connections: set[_EnvelopeConnection] = set()
        self.is_leaving = False
        self._folder: Path | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        """Starts to serve. Returns the path of the socket; "" if there is none."""
        if not self._parent:
            return ""
        try:
            _remove_stale(Path(self._parent))
            self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._parent))
            path = self._folder / _NAME
            self._server = await asyncio.get_running_loop().create_unix_server(lambda: _EnvelopeConnection(self), path)
            path.chmod(0o600)
        except OSError as error:
            log.warning("no Unix socket in %s, routers come over TCP: %s", self._parent, error)
            if self._server is not None:
                self._server.close()
            self._remove()
            return ""
        return str(path)

    async def stop(self, grace: float) -> None:
        """Tells routers to leave, waits up to `grace` seconds for the envelopes they sent, then fails the rest."""
        self._remove()
        if self._server is None:
            return
        self._server.close()
        # A connection accepted after this point sends LEAVING when it is made.
        self.is_leaving = True
        for connection in self.connections:
            connection.send(LEAVING, 0)
        start = time.monotonic()
        while self.connections and (waited := time.monotonic() - start) < grace:
            if waited > _LEAVE_SECONDS and not any(connection.is_busy for connection in self.connections):
                break  # the routers that remain do not react
            await asyncio.sleep(_LEAVE_SECONDS / 50)
        for connection in list(self.connections):
            connection.close()

    def _remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class _EnvelopeConnection(FrameConnection):
    def __init__(self, server: EnvelopeSocket) -> None:
        super().__init__(server.largest)
        self._server = server
        self._path = server.path
        self._count = server.count
        # Cancel functions, by the number of the call.
        self._under_way: dict[int, Callable[[], None]] = {}

    @property
    def is_busy(self) -> bool:
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
            self._start(number, payload)
        elif kind == CANCEL:
            self._cancel(number)
        else:
            raise FrameError(f"a frame of kind {kind}, which no caller sends")

    def _start(self, number: int, payload: bytes) -> None:
        coroutine = self._path(payload, (), None)
        try:
            coroutine.send(None)
        except StopIteration as end:
            self._answer(number, end.value)
        except Exception as error:
            self._answer(number, failure(faults.internal(log, "an envelope failed", error)))
        else:
            # Only calls that suspend need a driver, which costs a tenth of a quick run.
            driver = Driver(coroutine, partial(self._done, number))
            self._under_way[number] = driver.cancel
            driver.start()

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

    def _done(self, number: int, outcome: Answer | Failure | BaseException) -> None:
        if self._under_way.pop(number, None) is None:
            return  # cancelled
        if isinstance(outcome, BaseException):
            outcome = failure(faults.internal(log, "an envelope failed", outcome))
        self._answer(number, outcome)

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
    """Removes the sockets of killed processes of this user, on which no process listens."""
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
