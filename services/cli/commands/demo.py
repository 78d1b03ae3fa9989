"""`ringmesh demo`: runs magika's model on real files twice. The second pass is answered from the cache."""

from __future__ import annotations

import asyncio
import subprocess
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from ringmesh.ledger.v1 import ledger_pb2, ledger_pb2_grpc
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc

from services.cli.commands import shell, tables
from services.cli.commands.cost import money
from services.cli.commands.magika_features import MagikaFeatures
from services.cli.errors import CommandError
from services.cli.stack.probes import LOCAL
from services.cli.stack.stack import StackOptions
from services.runtime import w3c

_MOST_FILES = 60
_SECONDS = 60.0
_LEDGER_SECONDS = 20.0
_POLL_SECONDS = 0.1
_HITS = ("hit-local", "hit-shared", "hit-peer")


@dataclass(frozen=True, slots=True)
class Samples:
    """Up to 60 of the `files` under a folder, by name, with the model's input for each: int32 [1, 2048]."""

    features: dict[str, NDArray[np.int32]]
    files: int


@dataclass(frozen=True, slots=True)
class Classification:
    """A response. `body` is the serialized response; `compute_us` is its compute time."""

    label: str
    score: float
    body: bytes
    source: str
    compute_us: int
    seconds: float
    trace_id: str

    @property
    def is_hit(self) -> bool:
        return self.source in _HITS


def collect(folder: Path, magika: MagikaFeatures) -> Samples:
    """Returns files that are spread over the tree. Raises CommandError if none is large enough."""
    files = _list_files(folder)
    features: dict[str, NDArray[np.int32]] = {}
    # In an order that spreads any first 60 files over the tree, as some cannot be classified.
    for name in sorted(files, key=lambda name: zlib.crc32(name.encode(errors="surrogateescape"))):
        if len(features) < _MOST_FILES and (found := magika.extract(folder / name)) is not None:
            features[name] = found
    if not features:
        raise CommandError(f"no files to classify under {folder}; run the demo in another folder")
    return Samples(dict(sorted(features.items())), len(files))


async def run(console: Console, options: StackOptions, files: Samples, magika: MagikaFeatures, state: Path) -> int:
    """Runs both passes and prints their totals. Returns 1 unless the second pass had only hits with equal answers.

    In a terminal it waits for Ctrl-C, so that the console can show the traces. `state`: where they are stored.
    """
    passes: list[dict[str, Classification]] = []
    async with grpc.aio.insecure_channel(options.endpoints.router, options=LOCAL) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for number in (1, 2):
            try:
                passes.append({name: await _ask(stub, features, magika) for name, features in files.features.items()})
            except grpc.aio.AioRpcError as error:
                raise CommandError(f"the router answered {error.code().name}: {error.details()}") from None
            console.print()
            console.print(_table(number, passes[-1]))
    first, second = passes
    complaint = _complaint(first, second)
    slowest = max((*first.values(), *second.values()), key=lambda answer: answer.seconds)
    lines = [
        *_totals([*first.values()], [*second.values()]),
        f"second pass         {complaint or 'only hits, and each answer equals the first one byte for byte'}",
        f"files               classified {len(first)} of the {files.files} files in this folder",
        f"slowest request     {slowest.seconds * 1000:.1f} ms: {options.console}/traces/{slowest.trace_id}",
        f"                    after the demo: {shell.trace(slowest.trace_id, state)}",
    ]
    console.print()
    for line in lines:
        console.print(line, soft_wrap=True, style="red" if complaint and complaint in line else "")
    await _print_cost(console, options.endpoints.ledger, 2 * len(first))
    if console.is_terminal:
        console.print("\npress Ctrl-C to stop the console and the demo")
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    return 1 if complaint else 0


async def _print_cost(console: Console, address: str, requests: int) -> None:
    """Prints what the demo cost, once the ledger has counted its `requests`."""
    question = ledger_pb2.ReportRequest(from_ms=int((time.time() - 3600) * 1000))
    total, currency = ledger_pb2.ReportRow(), ""
    give_up = time.monotonic() + _LEDGER_SECONDS
    async with grpc.aio.insecure_channel(address, options=LOCAL) as channel:
        stub = ledger_pb2_grpc.LedgerServiceStub(channel)
        while total.requests < requests:
            if time.monotonic() > give_up:
                console.print(f"the ledger has counted {total.requests} of {requests} requests so far")
                return
            await asyncio.sleep(_POLL_SECONDS)
            with suppress(grpc.aio.AioRpcError):  # it may not have started yet
                answer = await stub.Report(question, timeout=_LEDGER_SECONDS)
                total, currency = answer.total, answer.currency
    console.print(
        f"cost                {money(total.cost_nano)} {currency} for {total.requests} requests; "
        f"the cache saved {money(total.saved_nano)} {currency}",
        soft_wrap=True,
    )


async def _ask(
    stub: grpc_service_pb2_grpc.GRPCInferenceServiceAsyncStub, features: NDArray[np.int32], magika: MagikaFeatures
) -> Classification:
    request = v2.ModelInferRequest(model_name="magika", raw_input_contents=[features.tobytes()])
    request.inputs.add(name="bytes", datatype="INT32", shape=features.shape)
    trace_id = w3c.new_trace_id()
    traceparent = w3c.traceparent(trace_id, w3c.new_span_id(), sampled=True)
    began = time.perf_counter()
    call = stub.ModelInfer(request, timeout=_SECONDS, metadata=(("traceparent", traceparent),))
    response = await call
    seconds = time.perf_counter() - began
    trailing = {key: value for key, value in await call.trailing_metadata() if isinstance(value, str)}
    scores = np.frombuffer(response.raw_output_contents[0], np.float32)
    best = int(scores.argmax())
    return Classification(
        label=magika.labels[best],
        score=float(scores[best]),
        body=response.SerializeToString(deterministic=True),
        source=trailing.get("ringmesh-cache", "?"),
        compute_us=int(trailing.get("ringmesh-compute-us", 0)),
        seconds=seconds,
        trace_id=trailing.get("ringmesh-trace-id", "?"),
    )


def _list_files(folder: Path) -> list[str]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=folder, capture_output=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))
    return sorted(name for name in listed.stdout.decode(errors="surrogateescape").split("\0") if name)


def _table(number: int, answers: Mapping[str, Classification]) -> Table:
    table = tables.create("file", "type", ">score", "answer from", ">ms", "trace id", title=f"pass {number}")
    table.columns[0].max_width = 40
    for name, answer in answers.items():
        table.add_row(
            name.encode(errors="replace").decode(),
            answer.label,
            f"{answer.score:.2f}",
            answer.source,
            f"{answer.seconds * 1000:.1f}",
            answer.trace_id[:12],
            style="green" if answer.is_hit else "",
        )
    return table


def _totals(first: Sequence[Classification], second: Sequence[Classification]) -> list[str]:
    answers = [*first, *second]
    hits = [answer for answer in answers if answer.is_hit]
    computed = sum(answer.compute_us for answer in answers if not answer.is_hit) / 1000
    saved = sum(answer.compute_us for answer in hits) / 1000
    return [
        f"hit ratio           {len(hits)} of {len(answers)} ({len(hits) / len(answers):.0%}); "
        f"second pass {sum(answer.is_hit for answer in second)} of {len(second)}",
        f"compute time saved  {saved:.0f} ms (computed: {computed:.0f} ms)",
        f"mean latency        first pass {_mean_ms(first):.1f} ms, second pass {_mean_ms(second):.1f} ms",
    ]


def _mean_ms(answers: Sequence[Classification]) -> float:
    return sum(answer.seconds for answer in answers) / len(answers) * 1000


def _complaint(first: Mapping[str, Classification], second: Mapping[str, Classification]) -> str:
    """Returns the first error of the second pass; "" if there is none."""
    for name, answer in second.items():
        if not answer.is_hit:
            return f"failed: the answer for {name} came from {answer.source!r}, not from a cache"
        if answer.body != first[name].body:
            return f"failed: the answer for {name} differs from the first one"
    return ""
