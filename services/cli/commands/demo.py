"""`ringmesh demo`: runs magika's model on real files twice. The second pass is answered from the cache."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Sequence
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

from services.cli.commands.cost import money
from services.cli.commands.first_calls import show_trace
from services.cli.commands.magika_features import MagikaFeatures
from services.cli.errors import CommandError
from services.cli.stack.probes import LOCAL
from services.runtime.w3c import new_span_id

_MOST_FILES = 60
_SECONDS = 60.0
_LEDGER_SECONDS = 20.0
_POLL_SECONDS = 0.1
_HITS = ("hit-local", "hit-shared", "hit-peer")


@dataclass(frozen=True, slots=True)
class Sample:
    """A file and the model's input for it: int32 [1, 2048]."""

    path: str
    features: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Answer:
    """A response. `body` is the serialized response without its id; `compute_us` is its compute time."""

    label: str
    score: float
    body: bytes
    source: str
    compute_us: int
    seconds: float
    trace_id: str

    @property
    def is_hit(self) -> bool:
        """Whether the answer came from a cache."""
        return self.source in _HITS


def collect(folder: Path, magika: MagikaFeatures) -> list[Sample]:
    """Returns up to 60 files under `folder`, spread over the tree: tracked by git, or all files outside git.

    Raises CommandError if none is large enough.
    """
    names = [name for name in _list_files(folder) if _size(folder / name) >= magika.smallest]
    samples = []
    for name in names[:: max(1, -(-len(names) // _MOST_FILES))]:
        try:
            with (folder / name).open("rb") as file:
                features = magika.extract(file)
        except OSError:
            continue
        if features is not None:
            samples.append(Sample(name, features))
    if not samples:
        raise CommandError(f"no files to look at under {folder}: run the demo in a folder that has some")
    return samples


async def run(
    console: Console, router: str, ledger: str, samples: Sequence[Sample], magika: MagikaFeatures, state: Path
) -> int:
    """Runs both passes and prints their totals. Returns 1 unless the second pass had only hits with equal answers.

    `router` and `ledger` are host:port. Prints `state` as the location of the traces.
    """
    passes: list[list[Answer]] = []
    async with grpc.aio.insecure_channel(router, options=LOCAL) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for number in (1, 2):
            try:
                passes.append([await _ask(stub, sample, magika, f"{number}-{sample.path}") for sample in samples])
            except grpc.aio.AioRpcError as error:
                raise CommandError(f"the router answered {error.code().name}: {error.details()}") from None
            console.print()
            console.print(_table(number, samples, passes[-1]))
    first, second = passes
    _print_totals(console, first, second)
    console.print(f"one request in full {show_trace(first[0].trace_id, state)}", soft_wrap=True, highlight=False)
    if complaint := _complaint(samples, first, second):
        console.print(f"[red]failed[/]: {complaint}", soft_wrap=True, highlight=False)
        return 1
    console.print("second pass: all hits, the same answers byte for byte", soft_wrap=True)
    await _print_cost(console, ledger, 2 * len(samples))
    return 0


async def _print_cost(console: Console, address: str, requests: int) -> None:
    """Prints what the demo cost, once the ledger has counted its `requests`."""
    question = ledger_pb2.ReportRequest(from_ms=int((time.time() - 3600) * 1000))
    total, currency = ledger_pb2.ReportRow(), ""
    give_up = time.monotonic() + _LEDGER_SECONDS
    async with grpc.aio.insecure_channel(address, options=LOCAL) as channel:
        stub = ledger_pb2_grpc.LedgerServiceStub(channel)
        while total.requests < requests:
            if time.monotonic() > give_up:
                console.print(f"the ledger has counted {total.requests} of {requests} requests so far", highlight=False)
                return
            await asyncio.sleep(_POLL_SECONDS)
            with suppress(grpc.aio.AioRpcError):  # it may not have started yet
                answer = await stub.Report(question, timeout=_LEDGER_SECONDS)
                total, currency = answer.total, answer.currency
    console.print(
        f"cost                {money(total.cost_nano)} {currency} for {total.requests} requests; "
        f"the cache saved {money(total.saved_nano)} {currency}",
        soft_wrap=True,
        highlight=False,
    )


async def _ask(
    stub: grpc_service_pb2_grpc.GRPCInferenceServiceAsyncStub, sample: Sample, magika: MagikaFeatures, request_id: str
) -> Answer:
    request = v2.ModelInferRequest(model_name="magika", id=request_id)
    request.inputs.add(name="bytes", datatype="INT32", shape=sample.features.shape)
    request.raw_input_contents.append(sample.features.tobytes())
    trace_id = new_span_id() + new_span_id()
    began = time.perf_counter()
    call = stub.ModelInfer(request, timeout=_SECONDS, metadata=(("traceparent", f"00-{trace_id}-{new_span_id()}-01"),))
    response = await call
    seconds = time.perf_counter() - began
    trailing = {key: value for key, value in await call.trailing_metadata() if isinstance(value, str)}
    scores = np.frombuffer(response.raw_output_contents[0], np.float32)
    best = int(scores.argmax())
    response.ClearField("id")
    return Answer(
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
        found = (path.relative_to(folder) for path in folder.rglob("*"))
        return sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))
    return sorted(name for name in listed.stdout.decode(errors="surrogateescape").split("\0") if name)


def _size(path: Path) -> int:
    """Returns the size in bytes; -1 if `path` is not a regular file or cannot be read."""
    try:
        return path.stat().st_size if path.is_file() else -1
    except OSError:
        return -1


def _table(number: int, samples: Sequence[Sample], answers: Sequence[Answer]) -> Table:
    table = Table(title=f"pass {number}", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("file", no_wrap=True, overflow="ellipsis", max_width=40)
    table.add_column("type", no_wrap=True)
    for column in ("score", "answer from", "ms", "trace id"):
        table.add_column(column, no_wrap=True, justify="right" if column in ("score", "ms") else "left")
    for sample, answer in zip(samples, answers, strict=True):
        table.add_row(
            sample.path.encode(errors="replace").decode(),
            answer.label,
            f"{answer.score:.2f}",
            answer.source,
            f"{answer.seconds * 1000:.1f}",
            answer.trace_id[:12],
            style="green" if answer.is_hit else "",
        )
    return table


def _print_totals(console: Console, first: Sequence[Answer], second: Sequence[Answer]) -> None:
    answers = [*first, *second]
    hits = [answer for answer in answers if answer.is_hit]
    computed = sum(answer.compute_us for answer in answers if not answer.is_hit) / 1000
    saved = sum(answer.compute_us for answer in hits) / 1000
    lines = [
        f"hit ratio           {len(hits)} of {len(answers)} ({len(hits) / len(answers):.0%}); "
        f"second pass {sum(answer.is_hit for answer in second)} of {len(second)}",
        f"compute time saved  {saved:.0f} ms (computed: {computed:.0f} ms)",
        f"mean latency        first pass {_mean_ms(first):.1f} ms, second pass {_mean_ms(second):.1f} ms",
    ]
    console.print()
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _mean_ms(answers: Sequence[Answer]) -> float:
    return sum(answer.seconds for answer in answers) / len(answers) * 1000


def _complaint(samples: Sequence[Sample], first: Sequence[Answer], second: Sequence[Answer]) -> str:
    """Returns the first error of the second pass; "" if there is none."""
    for sample, before, after in zip(samples, first, second, strict=True):
        if not after.is_hit:
            return f"the second answer for {sample.path} came from {after.source!r}, not from a cache"
        if after.body != before.body:
            return f"the second answer for {sample.path} is not the first one"
    return ""
