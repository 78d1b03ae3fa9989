"""`/metrics` over HTTP, in Prometheus text or OpenMetrics as the scraper asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.core import (
    Exemplar as PrometheusExemplar,
)
from prometheus_client.exposition import choose_encoder

from services.runtime.metrics import Buckets, Family, Metrics, Sample
from services.runtime.server import StartError

log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 32
_SECONDS = 10.0


class MetricsServer:
    """Serves the samples of `metrics`. Read on the event loop and written as text on a thread, one scrape at a time."""

    def __init__(self, address: str, metrics: Metrics) -> None:
        self._address = address
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._connections = 0
        self._one = asyncio.Lock()

    async def start(self) -> int:
        """Returns the port. Raises StartError where the address is taken or is none."""
        host, _, port = self._address.rpartition(":")
        try:
            self._server = await asyncio.start_server(self._serve, host.strip("[]"), int(port), limit=8192)
        except (OSError, ValueError, OverflowError) as error:
            raise StartError(
                f"cannot serve metrics on {self._address}, choose another with RINGMESH_METRICS_ADDRESS: {error}"
            ) from None
        bound: int = self._server.sockets[0].getsockname()[1]
        log.info("metrics are at http://%s:%d/metrics", host, bound)
        return bound

    def close(self) -> None:
        """Stops listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= _MAX_CONNECTIONS:
                async with asyncio.timeout(_SECONDS):
                    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                    writer.write(await self._answer(head))
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # a scraper that left, or was never one
        finally:
            self._connections -= 1
            writer.close()

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
    """The text and its content type, by the scraper's Accept header."""
    encode, content_type = choose_encoder(accept)
    body: bytes = encode(_Collected(samples))
    return body, content_type


class _Collected:
    """As prometheus_client takes it: something to collect from."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        families: dict[Family, Any] = {}
        for family, labels, value in self._samples:
            metric = families.get(family)
            if metric is None:
                metric = families[family] = _KINDS[family.kind](family.name, family.meaning, labels=family.labels)
            if isinstance(value, Buckets):
                metric.add_metric(labels, _cumulative(value), value.sum)
            else:
                metric.add_metric(labels, value)
        yield from families.values()


_KINDS: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


def _cumulative(value: Buckets) -> list[tuple[Any, ...]]:
    """(upper end, all up to it, exemplar)."""
    exemplars = value.exemplars or [None] * len(value.counts)
    total = 0
    out: list[tuple[Any, ...]] = []
    for bound, count, exemplar in zip([*map(repr, value.bounds), "+Inf"], value.counts, exemplars, strict=True):
        total += count
        shown = exemplar and PrometheusExemplar({"trace_id": exemplar.trace_id}, exemplar.value, exemplar.at)
        out.append((bound, total, shown))
    return out
