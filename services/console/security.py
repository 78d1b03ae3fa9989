"""Security of all console pages: accepted host names, cross-site protection, and content security headers."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.runtime.rpc.access import Access

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Accepts only the host names localhost, IP addresses and `hosts`, and POSTs only from the console's own pages and
    from an admin network.

    The first rule prevents DNS rebinding, the second cross-site requests. Both are necessary because there is no login,
    and so is the third: the console calls the fleet with the credential of a service.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], access: Access) -> None:
        self._app = app
        self._access = access
        self._hosts = frozenset({"localhost", *(host.lower() for host in hosts)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Implements ASGI."""
        if scope["type"] != "http":
            return
        method, client = scope["method"], scope["client"][0]
        refusal = self._refusal(method, Headers(scope=scope), client)
        if method not in ("GET", "HEAD"):
            self._access.audit.write("browser", f"{method} {scope['path']}", client, refusal or "accepted")
        if refusal:
            await PlainTextResponse(f"{refusal}\n", 403)(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, guarded)

    def _refusal(self, method: str, headers: Headers, client: str) -> str:
        changes = method not in ("GET", "HEAD")
        host = headers.get("host", "")
        name = host.rpartition("]")[0].lstrip("[") or host.partition(":")[0]
        if not _is_address(name) and name.lower() not in self._hosts:
            return f"unknown host name {name!r}; RINGMESH_CONSOLE_HOSTS lists the names of this console"
        if changes and headers.get("origin", "") not in (f"http://{host}", f"https://{host}"):
            return "this request must come from one of the console's own pages"
        if (changes or self._access.is_closed) and not self._access.is_admin_host(client):
            return f"this is for browsers on this host, not at {client}; name their networks in RINGMESH_ADMIN_NETWORKS"
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
