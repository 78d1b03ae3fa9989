"""The error for a request for a model or version that is not served."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

from services.runtime.errors import InvalidArgumentError, NotFoundError, RingmeshError, UnavailableError, some

# Why versions are not served, by model and version; the version is "" if the cause concerns no single version.
Failures = Mapping[str, Mapping[str, str]]

# Longer names get no suggestion.
_LONGEST_NAME = 64
_MOST_COMPARED = 100
_LEAST_SIMILARITY = 0.65


def absent(
    name: str, version: str, held: Mapping[str, Collection[str]], failures: Failures, *, suggests: bool = True
) -> RingmeshError:
    """Returns the error for a version that is not in `held`, the versions by model; `version` is "" for the latest.

    The error names at most one other model, and only if its name is similar and the caller may see it (`suggests`).
    """
    if version and re.fullmatch("[0-9]{1,20}", version) is None:
        return InvalidArgumentError(
            f"model_version is {version[:80]!r}; it is a whole number, or empty for the latest", field="model_version"
        )
    failed = failures.get(name, {})
    reason = failed.get(version, "") or ("" if name in held else next(iter(failed.values()), ""))
    if reason:
        which = f"version {version} of model {name!r}" if version in failed and version else f"model {name!r}"
        return UnavailableError(f"{which} failed to load: {reason}", kind="not_loaded")
    if name in held:
        return NotFoundError(
            f"model {name!r} has no version {version!r}; it has: {some(held[name])}", field="model_version"
        )
    near = nearest(name, (*held, *failures)) if suggests else ""
    hint = f"; did you mean {near!r}?" if near else "; RepositoryIndex lists those there are"
    return NotFoundError(f"Request for unknown model: {name!r} is not found{hint}", field="model_name")


def unreachable(name: str) -> UnavailableError:
    """Returns the error for a model that only workers hold which cannot be reached."""
    return UnavailableError(f"no worker that holds model {name!r} can be reached; retry later", kind="no_worker")


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the name in `known` of which `name` may be a misspelling; "" if there is none."""
    if len(name) > _LONGEST_NAME:
        return ""
    folded = {each.casefold(): each for each in known if abs(len(each) - len(name)) <= 2}
    compared = [*folded][:_MOST_COMPARED]
    found = difflib.get_close_matches(name.casefold(), compared, 1, _LEAST_SIMILARITY)
    return folded[found[0]] if found else ""
