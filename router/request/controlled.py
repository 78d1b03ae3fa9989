"""Requests with cache-control: they never get a stale answer and join no other request, whose answer may be too old."""

from __future__ import annotations  # compiled by mypyc

from cache.mesh import Compute, Found, Mesh
from cache.policy.cache_control import CacheControl
from cache.policy.worth_asking import NEVER
from router.balancing.catalog import ModelEntry
from router.request.call import Call
from router.request.local_answers import takes
from services.runtime.errors import FailedPreconditionError


async def find(mesh: Mesh, call: Call, model: ModelEntry, control: CacheControl, compute: Compute) -> Found:
    """Answers a call after a miss in the local tier.

    Raises FailedPreconditionError if `control` is only-if-cached and the answer is not cached.
    """
    subject = call.subject()
    decision = mesh.decide(call.key, subject)
    if not control.no_cache and (decision.asks or control.only_if_cached):
        entry = await mesh.look_up(call.key, subject, call.trace)
        if entry is not None and takes(control, model, entry):
            return Found(entry, "hit-shared", reason=decision.reason)
    if control.only_if_cached:
        raise FailedPreconditionError(
            "there is no such answer in the cache, and cache-control is only-if-cached", kind="not_cached"
        )
    computed = await compute()
    mesh.learn(subject, computed.seconds)
    if not control.no_store:
        # With no-cache the answer replaces the one that other routers may find in Redis.
        mesh.fill(computed, writes=decision.asks or (control.no_cache and decision is not NEVER))
    return Found(computed.entry, "miss", computed.worker, reason=decision.reason, model_digest=computed.model_digest)
