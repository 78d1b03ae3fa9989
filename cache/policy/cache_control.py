"""The `cache-control` metadata of a request, with the semantics of HTTP (RFC 9111, section 5.2.1).

`no-cache`: the answer is computed again and cached. `no-store`: a computed answer is not cached; a cached one can be
returned. `max-age=N`: the answer was computed at most N seconds ago. `only-if-cached`: the answer comes from the cache
or the request fails. As in HTTP, directives combine, names are case-insensitive, the smallest max-age wins, and unknown
directives are ignored. A malformed value is refused, because the caller would not notice that it had no effect.
"""

from __future__ import annotations  # compiled by mypyc

from functools import lru_cache
from typing import NamedTuple

from services.runtime.errors import InvalidArgumentError

_FLAGS = {"no-store": "no_store", "no-cache": "no_cache", "only-if-cached": "only_if_cached"}
_MAX_AGE_SECONDS = 2**31  # RFC 9111, section 1.2.2: larger values count as this one
_MAX_BYTES = 256


class CacheControl(NamedTuple):
    """The cache directives of one request."""

    no_store: bool = False
    no_cache: bool = False
    only_if_cached: bool = False
    max_age_ms: int | None = None

    def takes(self, created_at_ms: int, now_ms: int) -> bool:
        """Whether the directives accept an answer computed at `created_at_ms`."""
        if self.no_cache:
            return False
        return self.max_age_ms is None or now_ms - created_at_ms <= self.max_age_ms


@lru_cache(256)
def parse_cache_control(text: str) -> CacheControl:
    """Parses one or more headers, joined by commas. Raises InvalidArgumentError."""
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
            # int() raises ValueError for thousands of digits.
            seconds = min(int(argument.lstrip("0")[:10] or "0"), _MAX_AGE_SECONDS)
            max_age = seconds if max_age is None else min(max_age, seconds)
    return CacheControl(**flags, max_age_ms=None if max_age is None else max_age * 1000)
