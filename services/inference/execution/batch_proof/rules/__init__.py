"""The effect of each operator on the rows. Importing this package registers the rules."""

from services.inference.execution.batch_proof.registry import find
from services.inference.execution.batch_proof.rules import (
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

MODULES = (
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

__all__ = ["MODULES", "constant", "find"]
