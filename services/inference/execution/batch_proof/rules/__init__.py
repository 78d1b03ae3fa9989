"""What each operator makes of the rows; importing this registers the rules."""

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
