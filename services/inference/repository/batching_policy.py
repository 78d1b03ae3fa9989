"""Decides from a model's configuration whether requests share a run, by Triton's rules.

Triton's ONNX Runtime backend completes a configuration that lacks inputs or outputs (AutoCompleteConfig in
src/onnxruntime.cc of triton-inference-server/onnxruntime_backend): with a max_batch_size above 1 and no scheduler it
adds dynamic_batching. It does not change a complete configuration: without a scheduler each request runs alone, and
without max_batch_size there is no batch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.inference.repository.config import ModelConfig
from services.runtime.verdict import YES, Verdict


@dataclass(frozen=True, slots=True)
class BatchingPolicy:
    """`merges`: whether requests of several callers share a run; None: the configuration does not decide.

    `dims_leave_out_batch`: whether the configuration's dims omit the batch dimension; None: both forms are allowed.
    """

    merges: bool | None
    verdict: Verdict
    dims_leave_out_batch: bool | None


def policy(config: ModelConfig) -> BatchingPolicy:
    """The policy in the configuration of a model that is not an ensemble."""
    complete = bool((config.input or config.batch_input) and config.output)
    rows = config.max_batch_size
    if config.HasField("max_batch_size"):
        if not rows:
            return BatchingPolicy(False, Verdict("max_batch_size is 0 in its config.pbtxt"), False)
        if config.WhichOneof("scheduling_choice") or (rows > 1 and not complete):
            return BatchingPolicy(True, YES, True)
        return BatchingPolicy(
            False, Verdict(f"its config.pbtxt has max_batch_size {rows} and no dynamic_batching"), True
        )
    if complete:
        reason = "its config.pbtxt has inputs and outputs but no max_batch_size, which stands for 0"
        return BatchingPolicy(False, Verdict(reason), False)
    if config.HasField("sequence_batching"):
        # The configuration does not say which inputs have a row for each sequence.
        return BatchingPolicy(
            False, Verdict("it serves sequences, and its config.pbtxt does not say max_batch_size"), None
        )
    return BatchingPolicy(True if config.HasField("dynamic_batching") else None, YES, None)
