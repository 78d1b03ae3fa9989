"""A Unix socket at which routers of this host and user hand their envelopes in, as services/runtime/frames.py says."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from services.runtime.frames import ANSWER, CALL, CANCEL, FAILURE, LEAVING, FrameError, Frames
from services.runtime.rpc import Answer, Failure, Lane, failure, unexpected

log = logging.getLogger(__name__)

_PREFIX = "ringmesh-"
_NAME = "envelopes.sock"


class EnvelopeSocket:
    """Serves `lane`, all on the event loop, in a folder of its own below `folder` that only the owner may enter.

    The name is random: whoever finds a socket there has found this process, and not one of another container that has
    the same folders. Where there is no folder, or none can be made there, nothing is served. Requests above
    `max_message_bytes` are answered RESOURCE_EXHAUSTED.
    """

    def __init__(self, folder: str, lane: Lane, max_message_bytes: int) -> None:
        self._parent = folder
        self._lane = lane
        self._largest = max_message_bytes
        self._folder: Path | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()

    async def start(self) -> str:
        """The path; "" where there is none."""
        if not self._parent:
            return ""
        try:
            _remove_stale(Path(self._parent))
            self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._parent))
            path = self._folder / _NAME
            self._server = await asyncio.get_running_loop().create_unix_server(self._connection, path)
            path.chmod(0o600)
        except OSError as error:
            log.warning("no Unix socket in %s, routers come over TCP: %s", self._parent, error)
            self._remove()
            return ""
        return str(path)

    async def stop(self, grace: float) -> None:
        """Asks routers to go elsewhere, waits up to `grace` seconds for what they had sent, then ends the rest."""
        self._remove()
        if self._server is None:
            return
        self._server.close()
        for connection in self._connections:
            connection.send(LEAVING, 0)
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self._connections:
                    await next(iter(self._connections)).gone.wait()
        for connection in list(self._connections):
            connection.close()

    def _connection(self) -> _Connection:
        return _Connection(self._lane, self._largest, self._connections)

    def _remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Connection(Frames):
    def __init__(self, lane: Lane, largest: int, connections: set[_Connection]) -> None:
        super().__init__(largest)
        self._lane = lane
        self._connections = connections
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self.gone = asyncio.Event()
        connections.add(self)

    def take(self, kind: int, number: int, payload: bytes) -> None:
        if kind == CALL:
            try:
                admitted = self._lane.admit(payload, ())
            except Exception as error:
                log.exception("a lane failed")
                admitted = failure(unexpected(error))
            if isinstance(admitted, Answer | Failure):
                self._answer(number, admitted)
            else:
                task = asyncio.get_running_loop().create_task(self._finish(number, admitted))
                self._under_way[number] = task
        elif kind == CANCEL:
            task_or_none = self._under_way.pop(number, None)
            if task_or_none is not None:
                task_or_none.cancel()
        else:
            raise FrameError(f"a frame of kind {kind}, which no caller sends")

    def too_large(self, kind: int, number: int, size: int) -> None:
        if kind != CALL:
            raise FrameError(f"a frame of kind {kind} with {size} bytes")
        message = f"an envelope of {size} bytes; this worker takes {self._largest} at most"
        self._answer(number, Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, message, ()))

    def ended(self, why: str) -> None:
        for task in self._under_way.values():
            task.cancel()
        self._under_way.clear()
        self._connections.discard(self)
        self.gone.set()

    def close(self) -> None:
        """Fails what is under way."""
        stopping = Failure(grpc.StatusCode.UNAVAILABLE, "the server is stopping", ())
        for number, task in list(self._under_way.items()):
            task.cancel()
            self._answer(number, stopping)
        self._under_way.clear()
        if self.transport is not None:
            self.transport.close()

    async def _finish(self, number: int, call: Any) -> None:
        try:
            answer = await self._lane.finish(call, None)
        except asyncio.CancelledError:
            return
        except Exception as error:
            log.exception("a lane failed")
            answer = failure(unexpected(error))
        if self._under_way.pop(number, None) is not None:
            self._answer(number, answer)

    def _answer(self, number: int, answer: Answer | Failure) -> None:
        if isinstance(answer, Answer):
            self.send(ANSWER, number, answer.body)
        else:
            code: int = answer.code.value[0]
            self.send(FAILURE, number, bytes((code,)) + answer.message.encode())


def _remove_stale(folder: Path) -> None:
    """What processes of this user left behind when they were killed: nobody listens there."""
    for path in folder.glob(f"{_PREFIX}*/*.sock"):
        with suppress(OSError):
            if path.stat().st_uid == os.getuid() and not _is_listened_on(path):
                shutil.rmtree(path.parent, ignore_errors=True)


def _is_listened_on(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True
