"""Loads a model, and decides by its graph, its configuration and probes how requests share runs and cached rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from services.inference.execution import row_independence
from services.inference.execution.model import NOT_PROVEN, ModelLoadError, OnnxModel
from services.inference.repository import batching_policy
from services.inference.repository.config import ROW_CACHE, says
from services.inference.repository.repository import ModelFiles
from services.runtime.verdict import YES, Verdict

log = logging.getLogger(__name__)


def load_model(
    files: ModelFiles, *, providers: Sequence[str], intra_op_threads: int, max_batch_rows: int, caches: str = ""
) -> OnnxModel:
    """Opens a model and probes its rows. `max_batch_rows`: unless the configuration sets it. Raises ModelLoadError."""
    model = OnnxModel(files, providers=providers, intra_op_threads=intra_op_threads, caches=caches)
    decide(model, max_batch_rows)
    return model


def decide(model: OnnxModel, max_batch_rows: int) -> None:
    """Sets how requests share runs and cached rows. Raises ModelLoadError."""
    model.batchable = _batchable(model)
    model.has_rows = bool(model.batchable) or model.max_request_rows > 0
    if model.batchable:
        model.max_batch_rows = model.max_request_rows or max_batch_rows
    model.row_cache = _row_cache(model)


def _batchable(model: OnnxModel) -> Verdict:
    """Raises ModelLoadError if the configuration sets a batch size but the file has a fixed first dimension."""
    policy = batching_policy.policy(model.configured)
    free = row_independence.free_first_dimension(model)
    if policy.merges is None:
        return _all(free, _proven(model)) and row_independence.probed(model)
    if not (policy.merges or model.max_request_rows):
        return policy.verdict
    if not free and model.max_request_rows:
        raise ModelLoadError(
            f"cannot load {model.folder}: max_batch_size is {model.max_request_rows}, but {free.reason}"
        )
    return _all(policy.verdict, free)


def _row_cache(model: OnnxModel) -> Verdict:
    """Raises ModelLoadError if the configuration asks for it but the configuration or the graph rules it out."""
    asked = says(model.configured, ROW_CACHE)
    if asked is False:
        return Verdict("its config.pbtxt says so")
    # The rows of one request share a run even if requests do not.
    may_share = YES if asked and model.has_rows else model.batchable
    optional = len(model.inputs) > len(model.required)
    no_options = Verdict("it has optional inputs, which are for a whole run" if optional else "")
    verdict = _all(model.cacheable, may_share, _proven(model), no_options)
    if asked and not verdict:
        raise ModelLoadError(
            f"cannot load {model.folder}: {ROW_CACHE} is true in its config.pbtxt, but {verdict.reason}"
        )
    verdict = verdict and row_independence.worth_caching(model, asked_for=asked is True)
    if asked and not verdict:
        log.warning("model %s: %s is true in its config.pbtxt, but %s", model.name, ROW_CACHE, verdict.reason)
    return verdict


def _proven(model: OnnxModel) -> Verdict:
    return YES if model.independence else Verdict(f"{NOT_PROVEN}: {model.independence.reason}")


def _all(*verdicts: Verdict) -> Verdict:
    """The first verdict that is not true, or the last one."""
    return next((verdict for verdict in verdicts if not verdict), verdicts[-1])
