"""`ringmesh explain`: shows which worker a request would go to, and why."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import grpc
from google.protobuf import json_format
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc
from ringmesh.router.v1 import router_pb2, router_pb2_grpc

from services.cli.commands import running
from services.cli.errors import CommandError
from services.runtime.oip import tensors
from services.runtime.oip.sample_tensor import fill


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

    async def describe(channel: grpc.aio.Channel, seconds: float) -> v2.ModelMetadataResponse:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return await stub.ModelMetadata(v2.ModelMetadataRequest(name=model), timeout=seconds)

    request = v2.ModelInferRequest(model_name=model)
    for tensor in running.ask(router, "router", describe).inputs:
        shape = [1 if size < 0 else size for size in tensor.shape]
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
        request.raw_input_contents.append(tensors.encode(fill("random", tensor.datatype, shape)))
    return request


def explain(router: str, request: v2.ModelInferRequest, tenant: str) -> router_pb2.ExplainResponse:
    """Asks the router to explain the request. Raises CommandError."""

    async def call(channel: grpc.aio.Channel, seconds: float) -> router_pb2.ExplainResponse:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        return await stub.Explain(router_pb2.ExplainRequest(request=request, tenant=tenant), timeout=seconds)

    return running.ask(router, "router", call)


def show(console: Console, answer: router_pb2.ExplainResponse) -> None:
    """Prints the key, the owner, and every candidate in the order in which the router would try them."""
    if answer.uncached_reason:
        console.print(f"not cached  {escape(answer.uncached_reason)}", soft_wrap=True, highlight=False)
    else:
        console.print(f"key         {answer.key}", soft_wrap=True, highlight=False)
    if answer.owner:
        console.print(f"owner       {escape(answer.owner)}", soft_wrap=True, highlight=False)
    if answer.candidates:
        console.print(_table(answer.candidates))


def _table(candidates: Iterable[router_pb2.Candidate]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "worker", "rank", "load", "wait ms", "why"):
        right = column in ("rank", "load", "wait ms")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "why")
    for candidate in candidates:
        place = "/".join(part for part in (candidate.region, candidate.zone) if part)
        table.add_row(
            "→" if candidate.chosen else "",
            escape(f"{candidate.worker_id} {place}".rstrip()),
            str(candidate.rank),
            f"{candidate.load} of {candidate.bound}" if candidate.bound else str(candidate.load),
            f"{candidate.estimated_wait_us / 1000:.1f}",
            escape(candidate.reason),
            style="green" if candidate.chosen else "",
        )
    return table
