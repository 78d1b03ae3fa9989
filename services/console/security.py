"""Security of all console pages: host names, cross-site protection, who may do what, and content security headers."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request, cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.console.sessions import Sessions
from services.console.visitor import NOBODY, Visitor, role_of
from services.runtime.errors import PermissionDeniedError, UnauthenticatedError, UnavailableError
from services.runtime.rpc.access import Access

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
COOKIE = "ringmesh-session"
# The key of the Visitor in the scope of a request.
VISITOR = "ringmesh.visitor"


def visitor_of(request: Request) -> Visitor:
    """Who sent the request, as the guard found."""
    visitor: Visitor = request.scope.get(VISITOR, NOBODY)
    return visitor


class Guard:
    """Accepts only the host names localhost, IP addresses and `hosts`, POSTs only from the console's own pages, and
    only what the visitor may do.

    The first rule prevents DNS rebinding, the second cross-site requests. With API keys, the visitor is who signed in,
    or a program that sends a key as callers do. Without, everybody may read, and browsers of an admin network may do
    all. `refused` returns the page for an HTTPException.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Sequence[str],
        access: Access,
        sessions: Sessions | None,
        refused: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._access = access
        self._sessions = sessions
        self._refused = refused
        self._hosts = frozenset({"localhost", *(host.lower() for host in hosts)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Implements ASGI."""
        if scope["type"] != "http":
            return
        method, path = scope["method"], scope["path"]
        # A client that has left by now has no address.
        client = scope["client"][0] if scope["client"] else ""
        headers = Headers(scope=scope)
        refusal = self._refusal(method, headers)
        status = 0

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    added[name] = value
                added.setdefault("Cache-Control", "no-store")
            await send(message)

        answer: ASGIApp = PlainTextResponse(f"{refusal}\n", 403)
        if not refusal:
            try:
                visitor = scope[VISITOR] = self._visitor(headers, client)
                visitor.check(method, path)
                answer = self._app
            except UnauthenticatedError as error:
                scope[VISITOR] = NOBODY
                answer = self._app
                if role_of(method, path) is not None:
                    refusal = error.message
                    answer = _to_sign_in(scope, headers, refusal)
            except (PermissionDeniedError, UnavailableError) as error:
                refusal = error.message
                code = 403 if isinstance(error, PermissionDeniedError) else 503
                answer = PlainTextResponse(f"{refusal}\n", code)
                if _is_browser(headers):
                    page = HTTPException(code, f"{refusal[0].upper()}{refusal[1:]}.")
                    answer = await self._refused(Request(scope), page)
        try:
            await answer(scope, receive, guarded)
        finally:
            if method not in ("GET", "HEAD"):
                who, audit = visitor_of(Request(scope)).who, self._access.audit
                if refusal or status >= 400:
                    audit.refused(f"{method} {path}", client, str(status), refusal, who)
                else:
                    audit.write(who, f"{method} {path}", client, str(status))

    def _refusal(self, method: str, headers: Headers) -> str:
        host = headers.get("host", "")
        name = host.rpartition("]")[0].lstrip("[") or host.partition(":")[0]
        if not _is_address(name) and name.lower() not in self._hosts:
            return f"unknown host name {name!r}; RINGMESH_CONSOLE_HOSTS lists the names of this console"
        if method not in ("GET", "HEAD") and headers.get("origin", "") not in (f"http://{host}", f"https://{host}"):
            return "this request must come from one of the console's own pages"
        return ""

    def _visitor(self, headers: Headers, client: str) -> Visitor:
        """Who sent the request. Raises UnauthenticatedError, and UnavailableError as Access.identity."""
        if self._sessions is None:
            return Visitor(is_near=self._access.is_admin_host(client))
        if authorization := headers.get("authorization", ""):
            identity = self._access.identity(authorization)
            return Visitor(str(identity), identity=identity, authorization=authorization)
        sessions, token = self._sessions, cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        identity, authorization = sessions.find(token)
        return Visitor(str(identity), False, identity, authorization, lambda: sessions.is_open(token))


def _to_sign_in(scope: Scope, headers: Headers, reason: str) -> Response:
    """Browsers are sent to the sign-in, other clients get a 401."""
    if not _is_browser(headers):
        return PlainTextResponse(f"{reason}\n", 401, {"WWW-Authenticate": "Bearer"})
    query = scope["query_string"].decode(errors="replace")
    wanted = f"{scope['path']}?{query}" if query else scope["path"]
    return RedirectResponse(f"/sign-in?{urlencode({'next': wanted})}", 303)


def _is_browser(headers: Headers) -> bool:
    return "text/html" in headers.get("accept", "")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
