"""Pages, each at one URL: HTML for a browser that comes, and a stream of its live part for one that stays."""

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

Context: TypeAlias = Mapping[str, Any]
Contents: TypeAlias = Callable[[Request], Awaitable[Context]]

_PERIOD_SECONDS = 2.0
# Of one client, by its address, and of all. A page that is refused, or ended for another client's, stays as it was
# loaded and tries again.
MAX_STREAMS_OF_ONE = 32
MAX_STREAMS = 200


class Pages:
    """Renders templates; `stopping` ends all streams, `unheard` says who does not answer now."""

    def __init__(self, stopping: asyncio.Event, unheard: Callable[[], Sequence[str]]) -> None:
        self._stopping = stopping
        # By client, the oldest first; each is ended by its event.
        self._streams: dict[str, list[asyncio.Event]] = {}
        # What was sent of late, by path and query: all who watch one page share its rendering.
        self._rendered: dict[str, tuple[float, str]] = {}
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(units.FILTERS)
        self._templates.globals |= {"chart": chart, "unheard": unheard}
        self._templates.globals["parts"] = self._templates.get_template("parts.html").module

    def page(self, template: str, contents: Contents) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint. A template with a block `live` is streamed to who accepts `text/event-stream`."""

        async def answer(request: Request) -> Response:
            if "text/event-stream" in request.headers.get("accept", ""):
                return await self._stream(template, contents, request)
            context = await contents(request)
            return self.render(template, request, context, context.get("status", 200))

        return answer

    def render(self, template: str, request: Request, context: Context, status: int = 200) -> Response:
        """The whole page."""
        text = self._templates.get_template(template).render(path=request.url.path, **context)
        return HTMLResponse(text, status, headers={"Vary": "Accept"})

    async def _stream(self, template: str, contents: Contents, request: Request) -> Response:
        # What is wrong with the request is said before the stream begins.
        await self._live(template, contents, request)
        client = request.client.host if request.client else ""
        mine = self._streams.get(client, [])
        if len(mine) >= MAX_STREAMS_OF_ONE:
            return _refused(f"{MAX_STREAMS_OF_ONE} pages are live at {client} already")
        if sum(map(len, self._streams.values())) >= MAX_STREAMS:
            # Whoever has the most gives one up for a client with fewer.
            most = max(self._streams.values(), key=len)
            if len(most) <= len(mine) + 1:
                return _refused(f"{MAX_STREAMS} pages are live already")
            most.pop(0).set()
        ended = asyncio.Event()
        self._streams.setdefault(client, []).append(ended)
        return _Stream(self._events(template, contents, request, ended), partial(self._forget, client, ended))

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
        while not (self._stopping.is_set() or ended.is_set()):
            html = await self._live(template, contents, request)
            # An empty comment finds out who has left.
            yield ":\n\n" if html == last else "".join(f"data: {line}\n" for line in html.splitlines()) + "\n"
            last = html
            try:
                async with asyncio.timeout(_PERIOD_SECONDS):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    async def _live(self, template: str, contents: Contents, request: Request) -> str:
        """The page's block `live`, at most a period old."""
        page = f"{request.url.path}?{request.url.query}"
        now = time.monotonic()
        at, html = self._rendered.get(page, (-math.inf, ""))
        if now - at < _PERIOD_SECONDS * 0.9:
            return html
        block = self._templates.get_template(template)
        context = block.new_context({"path": request.url.path, **await contents(request)})
        html = "".join(block.blocks["live"](context))
        if len(self._rendered) >= MAX_STREAMS:
            self._rendered.clear()
        self._rendered[page] = (now, html)
        return html


class _Stream(StreamingResponse):
    """Events until the client leaves; `on_end` is called then, also if it left before the first."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def _refused(detail: str) -> Response:
    return PlainTextResponse(f"{detail}\n", 503, headers={"Retry-After": "30"})
