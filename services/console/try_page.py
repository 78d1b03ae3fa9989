"""The request builder: a form for any model, and a real inference from it."""

from __future__ import annotations

from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request

from services.console import models_page, trial
from services.console.live import Context
from services.console.sources import Sources

_MAX_BODY = 2 << 20
_MAX_FIELDS = 200
CACHE_CONTROL = ("", "no-cache", "no-store", "max-age=60", "only-if-cached")


async def contents(sources: Sources, request: Request) -> Context:
    """What `try.html` shows; with a POST, after the inference was sent."""
    form = await read_form(request) if request.method == "POST" else dict(request.query_params)
    models = sorted({model.name for model in sources.view.models if model.state != "UNAVAILABLE"})
    chosen = form.get("model") or next(iter(models), "")
    metadata = await models_page.metadata(sources, chosen) if chosen else None
    context = {
        "models": models,
        "chosen": chosen,
        "router": sources.view.router,
        "known": metadata is not None,
        "fields": trial.typed(metadata, form) if metadata else [],
        "cache_control": form.get("cache-control", ""),
        "choices": CACHE_CONTROL,
        "tenant": form.get("tenant", ""),
        "words": trial.WORDS,
        "answer": None,
        "problem": "",
    }
    if request.method != "POST" or metadata is None or sources.view.router is None:
        return context
    try:
        infer = trial.build(chosen, trial.typed(metadata, form))
    except trial.TrialError as error:
        return {**context, "problem": str(error)}
    if not (form.get("tenant", "").isascii() and form.get("tenant", "x").isprintable()):
        return {**context, "problem": "A tenant's name is made of printable ASCII characters."}
    channel = sources.fleet.channel(sources.view.router.address)
    headers = {"cache-control": form.get("cache-control", ""), "ringmesh-tenant": form.get("tenant", "")}
    return {**context, "answer": await trial.send(channel, infer, headers)}


async def read_form(request: Request) -> dict[str, str]:
    """The fields of an urlencoded form. Raises HTTPException where it is too large or none."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BODY:
            raise HTTPException(
                413, f"A form here has up to {_MAX_BODY >> 20} MiB; the words random, zeros and ones are short."
            )
    try:
        return dict(
            parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_MAX_FIELDS, strict_parsing=bool(body))
        )
    except ValueError:
        raise HTTPException(400, "This is not a form.") from None
