"""`ringmesh up`: shows a running stack and how to call it, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from services.cli.commands import model_list
from services.cli.commands.screen import Screen
from services.cli.stack import local_ca
from services.cli.stack.stack import StackOptions
from services.runtime.process import variables
from services.runtime.rpc.access import warning
from services.runtime.rpc.tls import TlsFiles


def warnings(address: str) -> list[str]:
    """About variables that have no effect, and about a router at `address` that is open to other hosts."""
    exposed = warning(address, has_keys=_has_keys())
    return [*variables.unknown(os.environ), *([exposed] if exposed else [])]


def tls_files(
    given: TlsFiles | None, client_ca: Path | None, state: Path, host: str, say: Callable[[str], None]
) -> TlsFiles:
    """The certificate that callers and browsers see: the one that is given, else one of a CA in `state`.

    Raises CommandError.
    """
    if given is not None:
        return given
    issued = replace(local_ca.issue(state / "tls", host), client_ca=client_ca)
    say(f"callers verify the certificate of this stack by {state.absolute() / 'tls' / local_ca.CA}")
    return issued


async def serve(screen: Screen, options: StackOptions) -> int:
    """Waits until it is cancelled. Raises CommandError if the router does not answer."""
    screen.endpoints(options)
    failures, sample = await asyncio.to_thread(model_list.first_look, options.routers[0], options.key_secret)
    for failure in failures:
        screen.say(failure)
    if failures and "RINGMESH_POLL_SECONDS" not in os.environ:
        screen.say("load a repaired model on its page of the console; RINGMESH_POLL_SECONDS=5 does it by polling")
    if sample is not None:
        screen.first_calls(options.endpoints.router, sample, options.tls, has_keys=_has_keys())
    screen.say("ready")
    try:
        await asyncio.Event().wait()
    finally:
        screen.say("draining; press Ctrl-C again to kill all processes")
    return 0


def _has_keys() -> bool:
    """Whether callers need a key or a token."""
    return not {"RINGMESH_API_KEYS", "RINGMESH_JWT_KEYS"}.isdisjoint(os.environ)
