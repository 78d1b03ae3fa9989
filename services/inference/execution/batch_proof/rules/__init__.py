"""The effect of each operator on the rows. Importing this package registers the rules."""

from services.inference.execution.batch_proof.registry import apply_rule
from services.inference.execution.batch_proof.rules import (  # noqa: F401 - they register their rules
    attention,
    contractions,
    counting,
    elementwise,
    indexing,
    layout,
    machine_learning,
    quantized,
    recurrent,
    reductions,
    windows,
)
from services.inference.execution.batch_proof.rules.counting import constant

__all__ = ["apply_rule", "constant"]
