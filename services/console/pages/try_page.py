"""The request builder: a form for any model that sends a real inference."""

from __future__ import annotations

from starlette.requests import Request

from services.console.data import trial
from services.console.data.sources import Sources
from services.console.pages import form, models_page
from services.console.pages.live import Context
from services.console.security import visitor_of
from services.runtime.oip.sample_tensor import WORDS

CACHE_CONTROL = ("", "no-cache", "no-store", "max-age=60", "only-if-cached")


async def contents(sources: Sources, request: Request) -> Context:
    """Returns the context of `try.html`. A POST sends the inference first."""
    sent = await form.read(request) if request.method == "POST" else dict(request.query_params)
    visitor = visitor_of(request)
    tenant, _ = visitor.limits
    served = {model.name for model in sources.view.models if model.state != "UNAVAILABLE"}
    models = sorted(name for name in served if visitor.sees(tenant, name))
    chosen = sent.get("model") or next(iter(models), "")
    metadata = await models_page.metadata(sources, chosen) if chosen and visitor.sees(tenant, chosen) else None
    fields = trial.inputs(metadata, sent) if metadata else []
    context = {
        "models": models,
        "chosen": chosen,
        "router": sources.view.router,
        "known": metadata is not None,
        "reason": next((failure.reason for failure in sources.view.failures if failure.model == chosen), ""),
        "fields": fields,
        "cache_control": sent.get("cache-control", ""),
        "choices": CACHE_CONTROL,
        "tenant": sent.get("tenant", tenant),
        "words": WORDS,
        "result": None,
        "problem": "",
    }
    if request.method != "POST" or metadata is None or sources.view.router is None:
        return context
    try:
        infer = trial.build(chosen, fields)
        headers = trial.headers(sent.get("cache-control", ""), sent.get("tenant", ""))
    except trial.TrialError as error:
        return {**context, "problem": str(error), "status": 400}
    async with sources.fleet.calling(sources.view.router.address, visitor.authorization) as channel:
        return {**context, "result": await trial.send(channel, infer, headers)}
