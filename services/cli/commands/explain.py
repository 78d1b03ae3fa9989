"""`ringmesh explain`: shows which worker a request would go to, and why."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from google.protobuf import json_format
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

from services.cli.commands import running, tables
from services.cli.commands.sample_request import sample
from services.cli.errors import CommandError


def read_request(source: str) -> v2.ModelInferRequest:
    """Reads a request in protobuf's JSON format, as grpcurl accepts it, from a file or `-`. Raises CommandError."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text()
        return json_format.Parse(text, v2.ModelInferRequest())
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read {source}: {error}") from None
    except json_format.ParseError as error:
        raise CommandError(
            f"{source} is not an inference.ModelInferRequest as JSON: {' '.join(str(error).split())}"
        ) from None


def random_request(router: str, model: str) -> v2.ModelInferRequest:
    """Returns a valid request for the model, with random values; dynamic dimensions are 1. Raises CommandError."""
    return running.ask(router, "router", lambda channel: sample(channel, model)).message("random")


def explain(router: str, request: v2.ModelInferRequest, tenant: str) -> router_pb2.ExplainResponse:
    message = router_pb2.ExplainRequest(request=request, tenant=tenant)
    return running.ask(router, "router", lambda channel: router_pb2_grpc.RouterServiceStub(channel).Explain(message))


def show(console: Console, answer: router_pb2.ExplainResponse) -> None:
    """Prints the key, the owner, and every candidate in the order in which the router would try them."""
    if answer.uncached_reason:
        console.print(f"not cached  {escape(answer.uncached_reason)}", soft_wrap=True)
    else:
        console.print(f"key         {answer.key}", soft_wrap=True)
    if answer.shared_tier:
        console.print(f"shared tier {escape(answer.shared_tier)}", soft_wrap=True)
    if answer.owner:
        console.print(f"owner       {escape(answer.owner)}", soft_wrap=True)
    if answer.candidates:
        console.print(_table(answer.candidates))


def _table(candidates: Iterable[router_pb2.Candidate]) -> Table:
    table = tables.create("", "worker", ">rank", ">load", ">wait ms")
    table.add_column("why")
    for candidate in candidates:
        location = "/".join(part for part in (candidate.region, candidate.zone) if part)
        table.add_row(
            "→" if candidate.chosen else "",
            escape(f"{candidate.worker_id} {location}".rstrip()),
            str(candidate.rank),
            f"{candidate.load} of {candidate.bound}" if candidate.bound else str(candidate.load),
            f"{candidate.estimated_wait_us / 1000:.1f}",
            escape(candidate.reason),
            style="green" if candidate.chosen else "",
        )
    return table
