"""Finds the processes of a running Ringmesh, and calls them with one-line error messages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from services.cli.errors import CommandError
from services.cli.stack.probes import LOCAL

_SECONDS = 10.0
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
            "and --router, --cache, --ledger or --console say where one runs that was started otherwise"
        ) from None
    except (ValueError, KeyError):
        raise CommandError(f"{state / 'stack.json'} is not what `ringmesh up` writes") from None


def ask(address: str, what: str, call: Callable[[grpc.aio.Channel, float], Awaitable[Answer]]) -> Answer:
    """Makes a call and returns its answer. `what` names the process. Raises CommandError with a readable status."""

    async def connected() -> Answer:
        async with grpc.aio.insecure_channel(
            address, options=(*LOCAL, ("grpc.max_receive_message_length", -1))
        ) as channel:
            return await call(channel, _SECONDS)

    try:
        return asyncio.run(connected())
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in (error.details() or "").lower():
            raise CommandError(f"no {what} answers at {address}; is it running?") from None
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise CommandError(f"the {what} at {address} did not answer within {_SECONDS:.0f} s") from None
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise CommandError(f"the {what} at {address} does not know this call: {error.details()}") from None
        raise CommandError(f"the {what} at {address} said {error.code().name}: {error.details()}") from None
