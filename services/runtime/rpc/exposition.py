"""`/metrics` over HTTP, in the Prometheus text format or in OpenMetrics, as the scraper requests."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable

from services.runtime.rpc.server import StartError
from services.runtime.rpc.tls import TlsFiles
from services.runtime.telemetry.metrics import Buckets, Family, Metrics, Sample

log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 32
_SECONDS = 10.0
_OPEN_METRICS = "application/openmetrics-text"


class MetricsServer:
    """Serves the samples of `metrics`: reads them on the event loop, formats them on a thread, one scrape at a time.
    `tls`: None: in plain text."""

    def __init__(self, address: str, metrics: Metrics, tls: TlsFiles | None = None) -> None:
        self._address = address
        self._tls = tls
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._connections = 0
        self._one = asyncio.Lock()

    async def start(self) -> int:
        """Starts listening and returns the port. Raises StartError if the address is taken or invalid, and TlsError."""
        host, _, port = self._address.rpartition(":")
        try:
            context = self._tls.context() if self._tls else None
            self._server = await asyncio.start_server(self._serve, host.strip("[]"), int(port), limit=8192, ssl=context)
        except (OSError, ValueError, OverflowError) as error:
            raise StartError(
                f"cannot serve metrics on {self._address}, choose another with RINGMESH_METRICS_ADDRESS: {error}"
            ) from None
        bound: int = self._server.sockets[0].getsockname()[1]
        log.info("metrics are at http%s://%s:%d/metrics", "s" if self._tls else "", host, bound)
        return bound

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= _MAX_CONNECTIONS:
                async with asyncio.timeout(_SECONDS):
                    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                    answer = await self._answer(head)
                    if writer.is_closing():  # uvloop would raise RuntimeError
                        return
                    writer.write(answer)
                    writer.close()
                    await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the scraper left, or the client is not one
        finally:
            self._connections -= 1
            # `close` alone would wait for a client that does not read.
            writer.transport.abort()

    async def _answer(self, head: str) -> bytes:
        request, *lines = head.split("\r\n")
        method, _, rest = request.partition(" ")
        path = rest.split(" ")[0].partition("?")[0]
        if path != "/metrics":
            return _response("404 Not Found", "text/plain", b"there is /metrics\n")
        if method != "GET":
            return _response("405 Method Not Allowed", "text/plain", b"/metrics is read with GET\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        async with self._one:
            samples = await self._metrics.collect()
            body, content_type = await asyncio.to_thread(expose, samples, headers.get("accept", ""))
        return _response("200 OK", content_type, body)


def _response(status: str, content_type: str, body: bytes) -> bytes:
    lines = (f"HTTP/1.1 {status}", f"Content-Type: {content_type}", f"Content-Length: {len(body)}", "Connection: close")
    return "\r\n".join((*lines, "", "")).encode() + body


def expose(samples: Iterable[Sample], accept: str) -> tuple[bytes, str]:
    """Returns the text and its content type, by the scraper's Accept header.

    prometheus_client is not used: it takes 10 us a line, and a process with hundreds of models has tens of thousands.
    """
    is_open = _OPEN_METRICS in accept
    families: dict[Family, list[str]] = {}
    for family, labels, value in samples:
        lines = families.get(family)
        if lines is None:
            lines = families[family] = _head(family, is_open=is_open)
        label_text = ",".join(
            [f'{name}="{_escaped(label)}"' for name, label in zip(family.labels, labels, strict=True)],
        )
        if isinstance(value, Buckets):
            _histogram(lines, family.name, label_text, value, is_open=is_open)
        else:
            lines.append(
                f"{family.name}{{{label_text}}} {_number(value)}" if label_text else f"{family.name} {_number(value)}"
            )
    text = "".join([f"{line}\n" for lines in families.values() for line in lines])
    if is_open:
        return f"{text}# EOF\n".encode(), f"{_OPEN_METRICS}; version=1.0.0; charset=utf-8"
    return text.encode(), "text/plain; version=0.0.4; charset=utf-8"


def _head(family: Family, *, is_open: bool) -> list[str]:
    meaning = family.meaning.replace("\\", r"\\").replace("\n", r"\n")
    # OpenMetrics names a counter without the suffix of its samples.
    name = family.name.removesuffix("_total") if is_open and family.kind == "counter" else family.name
    if is_open:
        meaning = meaning.replace('"', r"\"")
    # Triton's counters lack the suffix, without which OpenMetrics has no counters.
    kind = "unknown" if is_open and family.kind == "counter" and name == family.name else family.kind
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]


def _histogram(lines: list[str], name: str, labels: str, value: Buckets, *, is_open: bool) -> None:
    head = f'{name}_bucket{{{labels}{"," if labels else ""}le="'
    exemplars = value.exemplars if is_open and value.exemplars else None
    total = 0
    for index, (bound, count) in enumerate(zip((*map(repr, value.bounds), "+Inf"), value.counts, strict=True)):
        total += count
        line = f'{head}{bound}"}} {total}'
        if exemplars is not None and (shown := exemplars[index]) is not None:
            line += f' # {{trace_id="{shown.trace_id}"}} {shown.value!r} {shown.at:.3f}'
        lines.append(line)
    label_text = f"{{{labels}}}" if labels else ""
    lines += f"{name}_count{label_text} {total}", f"{name}_sum{label_text} {_number(value.sum)}"


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
