"""Pages: each URL serves HTML, or server-sent events with updates of the page's live part."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from services.console.data import units
from services.console.pages import chart
from services.console.security import visitor_of

Context: TypeAlias = Mapping[str, Any]
Contents: TypeAlias = Callable[[Request], Awaitable[Context]]

_PERIOD_SECONDS = 2.0
# Maximum streams of one client address, and of all clients. A page whose stream is refused, or ended to make room for
# another client, keeps its content and tries again.
MAX_STREAMS_OF_ONE = 32
MAX_STREAMS = 200


class Pages:
    """Renders templates. `stopping` ends all streams; `outages` returns a message per silent router."""

    def __init__(self, stopping: asyncio.Event, outages: Callable[[], Sequence[str]]) -> None:
        self._stopping = stopping
        # Streams by client, the oldest first. Setting its event ends a stream.
        self._streams: dict[str, list[asyncio.Event]] = {}
        # Recent renderings, which all viewers of a page share who see the same: by path and query, tenant and models.
        self._rendered: dict[Any, tuple[float, str]] = {}
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(units.FILTERS)
        self._templates.globals |= {"chart": chart, "router_outages": outages}
        self._templates.globals["parts"] = self._templates.get_template("parts.html").module

    def page(self, template: str, contents: Contents) -> Callable[[Request], Awaitable[Response]]:
        """Returns an endpoint. Clients that accept `text/event-stream` get a stream of the template's block `live`, if
        there is one."""

        is_live = "live" in self._templates.get_template(template).blocks

        async def answer(request: Request) -> Response:
            if is_live and "text/event-stream" in request.headers.get("accept", ""):
                return await self._stream(template, contents, request)
            context = await contents(request)
            return self.render(template, request, context, context.get("status", 200))

        return answer

    def render(self, template: str, request: Request, context: Context, status: int = 200) -> Response:
        text = self._templates.get_template(template).render(
            path=request.url.path, visitor=visitor_of(request), **context
        )
        return HTMLResponse(text, status, headers={"Vary": "Accept"})

    async def _stream(self, template: str, contents: Contents, request: Request) -> Response:
        # Render once now, so that an invalid request fails before the stream starts.
        await self._live(template, contents, request)
        client = request.client.host if request.client else ""
        mine = self._streams.get(client, [])
        if len(mine) >= MAX_STREAMS_OF_ONE:
            return _refused(f"{MAX_STREAMS_OF_ONE} pages of {client} are live already")
        if sum(map(len, self._streams.values())) >= MAX_STREAMS:
            # The client with the most streams loses its oldest one to a client with fewer.
            most = max(self._streams.values(), key=len)
            if len(most) <= len(mine) + 1:
                return _refused(f"{MAX_STREAMS} pages are live already")
            most.pop(0).set()
        ended = asyncio.Event()
        self._streams.setdefault(client, []).append(ended)
        return _EventStream(self._events(template, contents, request, ended), partial(self._forget, client, ended))

    def _forget(self, client: str, ended: asyncio.Event) -> None:
        streams = self._streams.get(client, [])
        if ended in streams:
            streams.remove(ended)
        if not streams:
            self._streams.pop(client, None)

    async def _events(
        self, template: str, contents: Contents, request: Request, ended: asyncio.Event
    ) -> AsyncIterator[str]:
        last = ""
        visitor = visitor_of(request)
        while visitor.is_current() and not (self._stopping.is_set() or ended.is_set()):
            html = await self._live(template, contents, request)
            # An empty comment detects clients that have disconnected.
            yield ":\n\n" if html == last else "".join(f"data: {line}\n" for line in html.splitlines()) + "\n"
            last = html
            try:
                async with asyncio.timeout(_PERIOD_SECONDS):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    async def _live(self, template: str, contents: Contents, request: Request) -> str:
        """Returns the page's block `live`, at most one period old."""
        visitor = visitor_of(request)
        page = (request.url.path, request.url.query, visitor.limits)
        now = time.monotonic()
        at, html = self._rendered.get(page, (-math.inf, ""))
        if now - at < _PERIOD_SECONDS * 0.9:
            return html
        block = self._templates.get_template(template)
        context = block.new_context({"path": request.url.path, "visitor": visitor, **await contents(request)})
        html = "".join(block.blocks["live"](context))
        if len(self._rendered) >= MAX_STREAMS:
            self._rendered.clear()
        self._rendered[page] = (now, html)
        return html


class _EventStream(StreamingResponse):
    """A stream of events until the client disconnects. Always calls `on_end`, even if no event was sent."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def _refused(detail: str) -> Response:
    return PlainTextResponse(f"{detail}\n", 503, headers={"Retry-After": "30"})
