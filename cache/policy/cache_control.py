"""`cache-control` as callers send it beside a request, with HTTP's meaning (RFC 9111, section 5.2.1).

`no-cache`: computed anew, and kept. `no-store`: what is computed for it is not kept; what is kept already may answer.
`max-age=N`: an answer computed at most N seconds ago. `only-if-cached`: an answer from the cache or none. Directives
combine, names are matched without case, the smallest max-age counts, and what is not known here is ignored, as HTTP
says. A value that cannot be read is refused: an answer other than the one asked for would go unnoticed.
"""

from __future__ import annotations  # compiled by mypyc

from functools import lru_cache
from typing import NamedTuple

from services.runtime.errors import InvalidArgumentError

_FLAGS = {"no-store": "no_store", "no-cache": "no_cache", "only-if-cached": "only_if_cached"}
_MAX_AGE_SECONDS = 2**31  # RFC 9111, section 1.2.2: what is larger counts as this
_MAX_BYTES = 256


class CacheControl(NamedTuple):
    """What one caller asks of the cache."""

    no_store: bool = False
    no_cache: bool = False
    only_if_cached: bool = False
    max_age_ms: int | None = None

    def takes(self, created_at_ms: int, now_ms: int) -> bool:
        """Whether an answer that was computed then will do."""
        if self.no_cache:
            return False
        return self.max_age_ms is None or now_ms - created_at_ms <= self.max_age_ms


@lru_cache(256)
def parse_cache_control(text: str) -> CacheControl:
    """Several headers stand in one text, separated by commas. Raises InvalidArgumentError."""
    if len(text) > _MAX_BYTES:
        raise InvalidArgumentError(f"cache-control has {len(text)} bytes; at most {_MAX_BYTES} are taken")
    flags: dict[str, bool] = {}
    max_age: int | None = None
    for part in text.split(","):
        name, equals, argument = part.strip().partition("=")
        name, argument = name.strip().lower(), argument.strip()
        if name in _FLAGS:
            if equals:
                raise InvalidArgumentError(f"cache-control: {name} takes no value, got {part.strip()!r}")
            flags[_FLAGS[name]] = True
        elif name == "max-age":
            if len(argument) > 1 and argument[0] == argument[-1] == '"':
                argument = argument[1:-1]
            if not (argument.isascii() and argument.isdecimal()):
                raise InvalidArgumentError(
                    f"cache-control: max-age is a number of seconds from 0, such as max-age=60; got {part.strip()!r}"
                )
            # Of thousands of digits int() makes an error.
            seconds = min(int(argument.lstrip("0")[:10] or "0"), _MAX_AGE_SECONDS)
            max_age = seconds if max_age is None else min(max_age, seconds)
    return CacheControl(**flags, max_age_ms=None if max_age is None else max_age * 1000)
