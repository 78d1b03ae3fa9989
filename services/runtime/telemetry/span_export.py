"""Span export to an OTLP/gRPC collector or a folder, through bounded queues.

If a destination is slow or gone, spans are dropped and counted; requests and memory are not affected.
"""

from __future__ import annotations  # compiled by mypyc

import asyncio
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar

import grpc

from services.runtime import wire
from services.runtime.telemetry.otlp import open_channel
from services.runtime.telemetry.spans import Process, Span, resource
from services.runtime.telemetry.supervisor import BACKGROUND

_QUEUE = 16384
_BATCH = 2048
_PERIOD_SECONDS = 0.5
_EXPORT_SECONDS = 5.0
_CLOSE_SECONDS = 2.0
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 10.0
_FILE_BYTES = 16 << 20
_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
# Codes after which the OTLP specification allows a retry.
_RETRYABLE = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)

Item = TypeVar("Item")
# Accepted; may be accepted on a retry; rejected for good.
Fate: TypeAlias = Literal["sent", "again", "lost"]


class Destination(Protocol[Item]):
    """Takes batches, one at a time."""

    name: str

    def pack(self, span: Span) -> Item:
        """Returns the item to queue for `span`; called on the request path."""

    async def send(self, batch: Sequence[Item]) -> Fate:
        """Sends a batch and returns the result. Raises nothing."""

    async def close(self) -> None:
        """Disconnects."""


class SpanQueue(Generic[Item]):
    """A queue of at most _QUEUE spans for `destination`; further ones are dropped and counted."""

    def __init__(self, destination: Destination[Item]) -> None:
        self.destination = destination
        self.sent = self.dropped = 0
        self._waiting: deque[Item] = deque()
        self._many = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def has_room(self) -> bool:
        return len(self._waiting) < _QUEUE

    def put(self, spans: Sequence[Span]) -> None:
        """Queues spans without waiting; to be called on the event loop."""
        if self._task is None:
            self._task = BACKGROUND.start("span export", self._run)
        room = max(0, _QUEUE - len(self._waiting))
        self.dropped += len(spans[room:])
        self._waiting.extend([self.destination.pack(span) for span in spans[:room]])
        if len(self._waiting) >= _BATCH:
            self._many.set()

    async def close(self) -> None:
        """Sends the queued spans, for at most _CLOSE_SECONDS, and drops the rest."""
        if self._task is not None:
            await BACKGROUND.end(self._task)
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                while self._waiting and await self._send() != "again":
                    pass
        self.dropped += len(self._waiting)
        await self.destination.close()

    async def _run(self) -> None:
        pause = 0.0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PERIOD_SECONDS):
                    await self._many.wait()
            while self._waiting:
                if await self._send() == "again":
                    pause = min(pause * 2 or _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
                    await asyncio.sleep(pause)
                else:
                    pause = 0.0
            self._many.clear()

    async def _send(self) -> Fate:
        batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
        fate: Fate = "again"
        try:
            fate = await self.destination.send(batch)
        finally:
            if fate == "sent":
                self.sent += len(batch)
            elif fate == "lost":
                self.dropped += len(batch)
            else:
                # Put back at the front as far as there is room; the oldest spans are dropped.
                room = min(len(batch), max(0, _QUEUE - len(self._waiting)))
                self.dropped += len(batch) - room
                self._waiting.extendleft(reversed(batch[len(batch) - room :]))
        return fate


class Collector:
    """An OTLP/gRPC collector at `endpoint`, such as http://127.0.0.1:4317."""

    name = "otlp"

    def __init__(self, endpoint: str) -> None:
        self._channel = open_channel(endpoint)
        self._export: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(_EXPORT)
        self._resources: dict[Process, bytes] = {}

    def pack(self, span: Span) -> tuple[Process, bytes]:
        """Serializes the span now, so that this work is spread over requests instead of done in one block."""
        return span.process, wire.field(2, span.to_otlp())

    async def send(self, batch: Sequence[tuple[Process, bytes]]) -> Fate:
        """Sends an ExportTraceServiceRequest; see opentelemetry/proto/collector/trace/v1."""
        spans: dict[Process, list[bytes]] = {}
        for process, packed in batch:
            spans.setdefault(process, []).append(packed)
        scope = wire.field(1, wire.field(1, b"ringmesh"))
        request = b"".join(
            wire.field(1, wire.field(1, self._resource(process)) + wire.field(2, scope + b"".join(packed)))
            for process, packed in spans.items()
        )
        try:
            await self._export(request, timeout=_EXPORT_SECONDS)
        except grpc.aio.AioRpcError as error:
            return "again" if error.code() in _RETRYABLE else "lost"
        return "sent"

    async def close(self) -> None:
        await self._channel.close()

    def _resource(self, process: Process) -> bytes:
        found = self._resources.get(process)
        if found is None:
            if len(self._resources) >= 1024:
                self._resources.clear()
            found = self._resources[process] = resource(process)
        return found


class SpanFolder:
    """Writes JSON lines to one file a process and keeps one rotated file: 32 MB in all."""

    name = "folder"

    def __init__(self, folder: Path, service: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{service}-{os.getpid()}.jsonl"

    def pack(self, span: Span) -> Span:
        return span

    async def send(self, batch: Sequence[Span]) -> Fate:
        """Writes the spans; if the disk is full or missing, only these spans are lost."""
        try:
            await asyncio.to_thread(self._write, batch)
        except OSError:
            return "lost"
        return "sent"

    async def close(self) -> None:
        """Does nothing: no file is held open."""

    def _write(self, batch: Sequence[Span]) -> None:
        lines = "".join(f"{span.to_json()}\n" for span in batch)
        if self._path.exists() and self._path.stat().st_size > _FILE_BYTES:
            self._path.replace(self._path.with_suffix(".1.jsonl"))
        with self._path.open("a") as file:
            file.write(lines)
