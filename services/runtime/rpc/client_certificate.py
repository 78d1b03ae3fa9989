"""The names in a caller's verified certificate, as a TLS edge passes them on: `x-forwarded-client-cert`.

    Hash=5f…;URI=spiffe://example.com/app;DNS=app.example.com

Whoever reads this header must know that the edge replaced what the caller sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

CLIENT_CERTIFICATE: Final = "x-forwarded-client-cert"
_NAMES = ("URI", "DNS")


def names(header: str) -> list[str]:
    """The names: the URI, then the DNS names. Several certificates, of a chain of proxies, count as none."""
    if "," in header:
        return []
    parts = [part.partition("=") for part in header.split(";")]
    return [value for kind, _, value in parts if kind in _NAMES and value]


def header(names: Iterable[str]) -> str:
    """The header for these names."""
    kept = [name for name in names if not {",", ";"} & {*name}]
    return ";".join(f"{'URI' if '://' in name else 'DNS'}={name}" for name in kept)
