"""The console's URLs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from services.console.data.sources import Sources
from services.console.pages import (
    audit_page,
    cache_page,
    compare_page,
    cost_page,
    fleet_page,
    models_page,
    objectives_page,
    sign_in_page,
    summary_api,
    traces_page,
    try_page,
    worker_page,
)
from services.console.pages.live import Pages
from services.console.security import Guard
from services.console.sessions import Sessions
from services.runtime.rpc.access import Access

log = logging.getLogger(__name__)


def create(sources: Sources, stopping: asyncio.Event, hosts: Sequence[str], access: Access) -> Starlette:
    """Creates the application. `hosts` are accepted besides IP addresses and localhost. `stopping` ends all streams.
    `access` says who may see and change what."""
    pages = Pages(stopping, sources.outages)
    sessions = Sessions(access.identity) if access.is_closed else None
    sign_in = sign_in_page.SignIn(pages, sessions)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        title = HTTPStatus(error.status_code).phrase
        detail = error.detail if error.detail != title else f"There is no page {request.url.path}."
        return pages.render("error.html", request, {"title": title, "detail": detail}, error.status_code)

    async def failed(request: Request, error: Exception) -> Response:
        log.error("%s failed", request.url.path, exc_info=error)
        detail = f"This page failed ({type(error).__name__}); see the console's log."
        return pages.render("error.html", request, {"title": "Internal error", "detail": detail}, 500)

    return Starlette(
        routes=[
            Route("/", pages.page("fleet.html", partial(fleet_page.contents, sources))),
            Route("/models", pages.page("models.html", partial(models_page.listing, sources))),
            Route(
                "/models/{name}", pages.page("model.html", partial(models_page.one, sources)), methods=["GET", "POST"]
            ),
            Route("/workers/{name}", pages.page("worker.html", partial(worker_page.contents, sources))),
            Route("/cache", pages.page("cache.html", partial(cache_page.contents, sources)), methods=["GET", "POST"]),
            Route("/objectives", pages.page("objectives.html", partial(objectives_page.contents, sources))),
            Route("/cost", pages.page("cost.html", partial(cost_page.contents, sources.ledger))),
            Route("/try", pages.page("try.html", partial(try_page.contents, sources)), methods=["GET", "POST"]),
            Route("/audit", pages.page("audit.html", partial(audit_page.contents, sources, access.audit))),
            Route("/traces", pages.page("traces.html", partial(traces_page.listing, sources))),
            Route("/compare", pages.page("compare.html", partial(compare_page.contents, sources))),
            Route("/traces/{trace_id}", pages.page("trace.html", partial(traces_page.one, sources))),
            Route("/api/summary", partial(summary_api.summary, sources)),
            Route("/sign-in", sign_in.sign_in, methods=["GET", "POST"]),
            Route("/sign-out", sign_in.sign_out, methods=["POST"]),
            Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
        ],
        middleware=[Middleware(Guard, hosts=hosts, access=access, sessions=sessions, refused=refused)],
        exception_handlers={HTTPException: refused, Exception: failed},
    )
