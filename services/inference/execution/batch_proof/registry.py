"""The rules, by operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.inference.execution.batch_proof.abstract_value import Content, Tensor
from services.inference.execution.batch_proof.operator_call import NotProvenError, OperatorCall

Outcome = Tensor | Sequence[Tensor | None]
ONNX, ML, MICROSOFT = "", "ai.onnx.ml", "com.microsoft"


@dataclass(frozen=True, slots=True)
class Rule:
    """The effect of an operator on tensors.

    `apply` returns the outputs, with None for outputs whose rows mix, and raises NotProvenError if all mix. `counts`:
    accepts inputs whose values contain the number of rows. `positions`: accepts inputs that are row numbers.
    """

    apply: Callable[[OperatorCall], Outcome]
    counts: bool
    positions: bool

    def __call__(self, call: OperatorCall) -> Sequence[Tensor | None]:
        """The outputs of a call. Raises NotProvenError."""
        for place, tensor in enumerate(call.inputs):
            if tensor is not None and tensor.counts_rows and not self.counts:
                raise NotProvenError(f"input {place} has the number of rows as a value")
            if tensor is not None and tensor.content is not Content.OWN and not self.positions:
                raise NotProvenError(f"input {place} has numbers of rows as values")
        made = self.apply(call)
        return (made,) if isinstance(made, Tensor) else made


_RULES: dict[tuple[str, str], Rule] = {}


def rule(
    *operators: str, domain: str = ONNX, counts: bool = False, positions: bool = False
) -> Callable[[Callable[[OperatorCall], Outcome]], Callable[[OperatorCall], Outcome]]:
    """Registers a function for `operators` of `domain`."""

    def register(apply: Callable[[OperatorCall], Outcome]) -> Callable[[OperatorCall], Outcome]:
        made = Rule(apply, counts, positions)
        for operator in operators:
            _RULES[domain, operator] = made
        return apply

    return register


def find(domain: str, operator: str) -> Rule | None:
    """The rule for an operator; None if there is no rule."""
    return _RULES.get(("" if domain == "ai.onnx" else domain, operator))
