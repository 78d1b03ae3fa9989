"""Pages, each at one URL: HTML for a browser that comes, and a stream of its live part for one that stays."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse

from services.console import chart, units

Context: TypeAlias = Mapping[str, Any]
Contents: TypeAlias = Callable[[Request], Awaitable[Context]]

_PERIOD_SECONDS = 2.0
MAX_STREAMS = 100


class Pages:
    """Renders templates; `stopping` ends all streams, `unheard` says who does not answer now."""

    def __init__(self, stopping: asyncio.Event, unheard: Callable[[], Sequence[str]]) -> None:
        self._stopping = stopping
        self._streams = 0
        # What was sent of late, by path and query: all who watch one page share its rendering.
        self._rendered: dict[str, tuple[float, str]] = {}
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
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
                return self._stream(template, contents, request)
            return self.render(template, request, await contents(request))

        return answer

    def render(self, template: str, request: Request, context: Context, status: int = 200) -> Response:
        """The whole page."""
        text = self._templates.get_template(template).render(path=request.url.path, **context)
        return HTMLResponse(text, status, headers={"Vary": "Accept"})

    def _stream(self, template: str, contents: Contents, request: Request) -> Response:
        if self._streams >= MAX_STREAMS:
            return PlainTextResponse(f"{MAX_STREAMS} pages are live already\n", 503, headers={"Retry-After": "30"})
        return StreamingResponse(self._events(template, contents, request), media_type="text/event-stream")

    async def _events(self, template: str, contents: Contents, request: Request) -> AsyncIterator[str]:
        self._streams += 1
        try:
            last = ""
            while not self._stopping.is_set():
                html = await self._live(template, contents, request)
                # An empty comment finds out who has left.
                yield ":\n\n" if html == last else "".join(f"data: {line}\n" for line in html.splitlines()) + "\n"
                last = html
                try:
                    async with asyncio.timeout(_PERIOD_SECONDS):
                        await self._stopping.wait()
                except TimeoutError:
                    continue
        finally:
            self._streams -= 1

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
