"""The audit page: who did what, in the logs of all processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from ringmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from starlette.requests import Request

from services.console.data.fleet_watch import FleetWatch, ask
from services.console.data.sources import Sources
from services.console.pages.live import Context
from services.runtime.rpc.audit_log import AuditLog, time_text
from services.runtime.rpc.audit_service import pages

SPANS = {"1h": 3600, "24h": 86_400, "7d": 7 * 86_400, "30d": 30 * 86_400}
_LIMIT = 200
_SECONDS = 5.0


async def contents(sources: Sources, audit: AuditLog, request: Request) -> Context:
    """Returns the context of `audit.html`. Processes of a host may share a log, so each entry is shown once."""
    given = {name: request.query_params.get(name, "").strip() for name in ("span", "who", "method")}
    span = given["span"] if given["span"] in SPANS else "24h"
    begin = int((time.time() - SPANS[span]) * 1000)
    asked = audit_pb2.ListRequest(from_ms=begin, who=given["who"], method=given["method"], limit=_LIMIT)
    view = sources.view
    addresses = [*(router.address for router in view.routers), view.cache.address, *view.workers]
    answers = await asyncio.gather(*(_entries(sources.fleet, address, asked) for address in dict.fromkeys(addresses)))
    own = await asyncio.to_thread(lambda: [entry for page in pages(audit, asked) for entry in page])
    found = {entry.SerializeToString(deterministic=True): entry for entries, _ in answers for entry in entries}
    found |= {entry.SerializeToString(deterministic=True): entry for entry in own}
    return {
        "entries": sorted(found.values(), key=lambda entry: -entry.at_ms)[:_LIMIT],
        "problems": [problem for _, problem in answers if problem],
        "spans": tuple(SPANS),
        "limit": _LIMIT,
        "time_text": time_text,
        **given,
        "span": span,
    }


async def _entries(
    fleet: FleetWatch, address: str, asked: audit_pb2.ListRequest
) -> tuple[Sequence[audit_pb2.Entry], str]:
    """Returns the entries of a process, and "" or why there are none."""

    async def listing() -> list[audit_pb2.Entry]:
        call = audit_pb2_grpc.AuditServiceStub(fleet.channel(address)).List(asked, timeout=_SECONDS)
        return [entry async for page in call for entry in page.entries]

    found, problem = await ask(listing)
    return found or (), problem and f"{address}: {problem}."
