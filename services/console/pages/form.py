"""Reads the forms that the console's pages submit."""

from __future__ import annotations

from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request

_MAX_BYTES = 2 << 20
_MAX_FIELDS = 200


async def read(request: Request) -> dict[str, str]:
    """Returns the fields of a URL-encoded form. Raises HTTPException if it is too large or invalid."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BYTES:
            detail = f"A form must have up to {_MAX_BYTES >> 20} MiB. For large tensors use random, zeros or ones."
            raise HTTPException(413, detail)
    try:
        text = body.decode()
        return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=_MAX_FIELDS, strict_parsing=bool(text)))
    except ValueError:
        raise HTTPException(400, "The request must be a URL-encoded form.") from None
