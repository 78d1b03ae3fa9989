"""Actions that a page asks to confirm before it takes them, so that one click or a stale form changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What a page says about an action: a question with the `fields` to send again and the `button`, or its result."""

    question: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    button: str = ""
    notice: str = ""
    problem: str = ""
