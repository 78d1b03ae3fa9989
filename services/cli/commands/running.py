"""Finds the processes of a running Ringmesh, and calls them with one-line error messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from services.cli.errors import CommandError
from services.cli.stack.probes import LOCAL

# Time limit of a call that computes nothing.
SECONDS = 10.0
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Running:
    """Endpoints of a running stack: host:port of router, cache and ledger, and the URL of the console."""

    router: str
    cache: str
    ledger: str
    console: str


def find(state: Path) -> Running:
    """Finds the stack with the state folder `state`. Raises CommandError if none is running."""
    try:
        found = json.loads((state / "stack.json").read_text())
        return Running(found["router"], found["cache"], found["ledger"], found["console"])
    except OSError:
        raise CommandError(
            f"no stack runs in {state}: `ringmesh up` starts one, --state names another folder, "
            "and --router, --cache, --ledger or --console name processes that were started otherwise"
        ) from None
    except (ValueError, KeyError):
        raise CommandError(f"{state / 'stack.json'} was not written by `ringmesh up`") from None


def ask(address: str, process: str, call: Callable[[grpc.Channel], Answer]) -> Answer:
    """Makes calls to the process at `address`. Raises CommandError if one fails."""
    try:
        with grpc.insecure_channel(address, (*LOCAL, ("grpc.max_receive_message_length", -1))) as channel:
            return call(channel)
    except grpc.RpcError as error:
        status: grpc.Call = error  # type: ignore[assignment]  # as grpcio raises it
        details = status.details() or ""
        if status.code() is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
            raise CommandError(f"no {process} answers at {address}; is it running?") from None
        raise CommandError(f"the {process} at {address} answered {status.code().name}: {details}") from None
