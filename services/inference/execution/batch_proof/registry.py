"""The rules, by operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from services.inference.execution.batch_proof.abstract_value import Content, Tensor
from services.inference.execution.batch_proof.operator_call import NotProvenError, OperatorCall

# The outputs, with None for those whose rows mix. A rule raises NotProvenError if all mix.
Outcome: TypeAlias = Tensor | Sequence[Tensor | None]
Rule: TypeAlias = Callable[[OperatorCall], Outcome]


class _RuleEntry(NamedTuple):
    apply: Rule
    counts: bool
    positions: bool


_RULES: dict[str, _RuleEntry] = {}


def rule(*operators: str, counts: bool = False, positions: bool = False) -> Callable[[Rule], Rule]:
    """Registers the effect of `operators`, named as by graph.name_of, on tensors.

    `counts`: it accepts inputs whose values contain the number of rows. `positions`: it accepts row numbers.
    """

    def register(apply: Rule) -> Rule:
        _RULES.update(dict.fromkeys(operators, _RuleEntry(apply, counts, positions)))
        return apply

    return register


def apply_rule(name: str, call: OperatorCall) -> Sequence[Tensor | None] | None:
    """The outputs of a call; None if there is no rule for it. Raises NotProvenError."""
    if (found := _RULES.get(name)) is None:
        return None
    for index, tensor in enumerate(call.inputs):
        if tensor is not None and tensor.counts_rows and not found.counts:
            raise NotProvenError(f"input {index} has the number of rows as a value")
        if tensor is not None and tensor.content is not Content.OWN and not found.positions:
            raise NotProvenError(f"input {index} has numbers of rows as values")
    made = found.apply(call)
    return (made,) if isinstance(made, Tensor) else made
