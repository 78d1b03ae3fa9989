"""URLs for messages, logs and files: without secrets."""

from __future__ import annotations


def without_credentials(url: str) -> str:
    """Returns `url` with `***` for user and password, and without options, which may hold a password too.

    Also for URLs that are invalid because a password is not percent-encoded.
    """
    head, at, rest = url.rpartition("@")
    scheme, separator, _ = (head if at else url).partition("://")
    rest, _, _ = rest.partition("?")
    if not at:
        return rest
    return f"{scheme}{separator}***@{rest}" if separator and "?" not in head else f"{scheme if separator else ''}***"
