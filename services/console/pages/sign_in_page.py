"""Signs browsers in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from services.console.pages import form
from services.console.pages.live import Pages
from services.console.security import COOKIE, VISITOR
from services.console.sessions import SECONDS, Sessions
from services.console.visitor import Visitor
from services.runtime.errors import ResourceExhaustedError, RingmeshError, UnauthenticatedError, UnavailableError

_STATUSES: Mapping[type[RingmeshError], int] = {
    UnauthenticatedError: 401,
    ResourceExhaustedError: 429,
    UnavailableError: 503,
}


class SignIn:
    """The form that asks for an API key. `sessions`: None if there are no API keys, so that nobody needs to sign in."""

    def __init__(self, pages: Pages, sessions: Sessions | None) -> None:
        self._pages = pages
        self._sessions = sessions

    async def sign_in(self, request: Request) -> Response:
        """GET shows the form, POST starts a session and leads to the page that was wanted."""
        wanted = _own_path(request.query_params.get("next", ""))
        if self._sessions is None:
            return RedirectResponse(wanted, 303)
        if request.method != "POST":
            return self._pages.render("sign_in.html", request, {"problem": ""})
        sent = await form.read(request)
        try:
            token = self._sessions.open(sent.get("key", "").strip(), request.client.host if request.client else "")
        except tuple(_STATUSES) as error:
            problem = {"problem": f"{error.message[0].upper()}{error.message[1:]}."}
            response = self._pages.render("sign_in.html", request, problem, _STATUSES[type(error)])
            if error.retry_after is not None:
                response.headers["Retry-After"] = str(math.ceil(error.retry_after))
            return response
        self._sessions.close(request.cookies.get(COOKIE, ""))
        identity, _ = self._sessions.find(token)
        request.scope[VISITOR] = Visitor(str(identity), identity=identity)
        return _with_cookie(request, RedirectResponse(wanted, 303), token, int(SECONDS))

    async def sign_out(self, request: Request) -> Response:
        """Ends the session."""
        if self._sessions is not None:
            self._sessions.close(request.cookies.get(COOKIE, ""))
        return _with_cookie(request, RedirectResponse("/sign-in", 303), "", 0)


def _with_cookie(request: Request, response: Response, token: str, seconds: int) -> Response:
    # Behind a proxy with TLS, the origin of the page shows it; the guard has checked that it is the console's.
    is_secure = request.headers.get("origin", "").startswith("https:") or request.url.scheme == "https"
    response.set_cookie(COOKIE, token, max_age=seconds, httponly=True, samesite="strict", secure=is_secure)
    return response


def _own_path(wanted: str) -> str:
    """A path of this console; other values are replaced by the first page."""
    return wanted if wanted.startswith("/") and not wanted.startswith(("//", "/\\", "/sign-")) else "/"
