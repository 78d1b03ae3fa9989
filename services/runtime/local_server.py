"""A second way to a server, for this user's processes on the same host: a Unix socket."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from services.runtime.server import Server, StartError

log = logging.getLogger(__name__)

_PREFIX = "ringmesh-"
_NAME = "grpc.sock"


class LocalServer:
    """What `listener` makes of unix:path, in a folder of its own below `folder` that only the owner may enter.

    The name is random: whoever finds a socket there has found this process, and not one of another container that has
    the same folders. Where there is no folder, or none can be made there, nothing is served.
    """

    def __init__(self, folder: str, listener: Callable[[str], Server]) -> None:
        self._parent = folder
        self._listener = listener
        self._folder: Path | None = None
        self._server: Server | None = None

    async def start(self) -> str:
        """The path; "" where there is none."""
        if not self._parent:
            return ""
        try:
            _remove_stale(Path(self._parent))
            self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._parent))
            path = self._folder / _NAME
            server = self._listener(f"unix:{path}")
            await server.start()
            path.chmod(0o600)
        except (OSError, StartError) as error:
            log.warning("no Unix socket in %s, routers come over TCP: %s", self._parent, error)
            self._remove()
            return ""
        self._server = server
        return str(path)

    async def stop(self, grace: float) -> None:
        """As Server.stop; nobody finds it any more."""
        self._remove()
        if self._server is not None:
            await self._server.stop(grace)

    def _remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _remove_stale(folder: Path) -> None:
    """What processes of this user left behind when they were killed: nobody listens there."""
    for path in folder.glob(f"{_PREFIX}*/{_NAME}"):
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            if path.stat().st_uid != os.getuid():
                continue
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                shutil.rmtree(path.parent, ignore_errors=True)
