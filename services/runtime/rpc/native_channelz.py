"""Channelz of a server on the native engine: the server and its connections, without counts.

Of grpcio's channels in the same process, grpcio answers; its numbers start at 1.
"""

from __future__ import annotations

from typing import Any

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2

from services.runtime.rpc.native_server import NativeServer

_SERVER = 1 << 32
_MAX_RESULTS = 100


class NativeChannelz(channelz.aio.ChannelzServicer):  # type: ignore[misc]
    """Answers for `server`, which listens on `address`."""

    def __init__(self, server: NativeServer, address: str) -> None:
        self._server = server
        self._made = channelz_pb2.Server(ref=channelz_pb2.ServerRef(server_id=_SERVER, name=address))

    async def GetServers(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The one server."""
        made = [self._made] if request.start_server_id <= _SERVER else []
        return channelz_pb2.GetServersResponse(server=made, end=True)

    async def GetServer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The server, by its number."""
        await _check(request.server_id, context)
        return channelz_pb2.GetServerResponse(server=self._made)

    async def GetServerSockets(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The open connections in the order in which they were made."""
        await _check(request.server_id, context)
        found = sorted(pair for pair in self._server.numbered() if pair[0] + _SERVER >= request.start_socket_id)
        count = request.max_results if request.max_results > 0 else _MAX_RESULTS
        references = [channelz_pb2.SocketRef(socket_id=number + _SERVER, name=peer) for number, peer in found[:count]]
        return channelz_pb2.GetServerSocketsResponse(socket_ref=references, end=len(found) <= count)


async def _check(number: int, context: Any) -> None:
    if number != _SERVER:
        await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no server {number}; GetServers says which there is")
