"""Whether requests share a run, as far as the model's configuration decides it, read as Triton reads it.

Triton's ONNX Runtime backend completes a configuration that lacks inputs or outputs (AutoCompleteConfig in
src/onnxruntime.cc of triton-inference-server/onnxruntime_backend): with a max_batch_size above 1 and no scheduler it
adds dynamic_batching. A complete configuration is taken as it is: without a scheduler each request runs alone, and
without max_batch_size there is no batch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.inference.repository.config import ModelConfig


@dataclass(frozen=True, slots=True)
class BatchingPolicy:
    """`merges`: whether requests of several callers share a run; None: the configuration leaves that open. `reason`
    says why they do not.

    `dims_leave_out_batch`: whether the configuration's dims go without the batch dimension; None: they may be either.
    """

    merges: bool | None
    reason: str
    dims_leave_out_batch: bool | None


def policy(config: ModelConfig) -> BatchingPolicy:
    """What the configuration of a single model, not an ensemble, decides."""
    complete = bool((config.input or config.batch_input) and config.output)
    rows = config.max_batch_size
    if config.HasField("max_batch_size"):
        if not rows:
            return BatchingPolicy(False, "max_batch_size is 0 in its config.pbtxt", False)
        if config.WhichOneof("scheduling_choice") or (rows > 1 and not complete):
            return BatchingPolicy(True, "", True)
        return BatchingPolicy(False, f"its config.pbtxt has max_batch_size {rows} and no dynamic_batching", True)
    if complete:
        reason = "its config.pbtxt has inputs and outputs but no max_batch_size, which stands for 0"
        return BatchingPolicy(False, reason, False)
    if config.HasField("sequence_batching"):
        # Nobody knows which of its inputs have a row for each sequence.
        return BatchingPolicy(False, "it serves sequences, and its config.pbtxt does not say max_batch_size", None)
    return BatchingPolicy(True if config.HasField("dynamic_batching") else None, "", None)
