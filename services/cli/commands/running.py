"""Finds the processes of a running Ringmesh, and calls them with one-line error messages."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from services.cli.errors import CommandError
from services.cli.stack.probes import LOCAL
from services.runtime.rpc.access import AUTHORIZATION, CREDENTIAL, credential_of

# Time limit of a call that computes nothing.
_SECONDS = 10.0
Answer = TypeVar("Answer")


def endpoint(name: str, state: Path) -> str:
    """Returns the endpoint of a process of the stack in the folder `state`. Raises CommandError.

    `name`: `router`, `cache`, `ledger` or `console`. It is host:port, for the console a URL.
    """
    try:
        found: str = json.loads((state / "stack.json").read_text())[name]
    except OSError:
        raise CommandError(
            f"no stack runs in {state}: `ringmesh up` starts one, --state names another folder, "
            "and --router, --cache, --ledger or --console name processes that were started otherwise"
        ) from None
    except (ValueError, KeyError):
        raise CommandError(f"{state / 'stack.json'} was not written by `ringmesh up`") from None
    return found


class _Identified(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Sends RINGMESH_API_KEY, or the credential of a key secret. Limits the time of calls without a limit."""

    def __init__(self, secret: str) -> None:
        key = os.environ.get("RINGMESH_API_KEY")
        self._entry = (AUTHORIZATION, f"Bearer {key}") if key else (CREDENTIAL, credential_of(secret))

    def intercept_unary_unary(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), self._entry]
        return continuation(details._replace(metadata=metadata, timeout=details.timeout or _SECONDS), request)

    intercept_unary_stream = intercept_unary_unary  # type: ignore[assignment]


def ask(address: str, process: str, call: Callable[[grpc.Channel], Answer], secret: str = "") -> Answer:
    """Makes calls to the process at `address`. `secret`: the key secret, if RINGMESH_KEY_SECRET is not set. Raises
    CommandError if one fails."""
    try:
        with grpc.insecure_channel(address, (*LOCAL, ("grpc.max_receive_message_length", -1))) as channel:
            who = _Identified(secret or os.environ.get("RINGMESH_KEY_SECRET", ""))
            return call(grpc.intercept_channel(channel, who))
    except grpc.RpcError as error:
        status: grpc.Call = error  # type: ignore[assignment]  # as grpcio raises it
        details = status.details() or ""
        if status.code() is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
            raise CommandError(f"no {process} answers at {address}; is it running?") from None
        if status.code() is grpc.StatusCode.UNAUTHENTICATED:
            details += "; RINGMESH_API_KEY has the key of these commands"
        raise CommandError(f"the {process} at {address} answered {status.code().name}: {details}") from None
