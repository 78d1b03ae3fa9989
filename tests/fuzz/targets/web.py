"""HTTP: the console, `/metrics`, spans, and the metrics that the console reads."""

import asyncio
import atexit
from urllib.parse import quote

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from services.console.data.exposition_reader import ExpositionReader
from services.console.data.otlp import TraceReceiver
from services.console.data.trace_store import TraceQuery, TraceStore
from services.runtime.rpc.exposition import MetricsServer
from services.runtime.telemetry.metrics import Metrics
from tests.fuzz.target import joined, parts, target
from tests.unit.console.data.test_console_requests import TRACE, Console
from tests.unit.console.data.test_trace_store import span

PATHS = (
    "/", "/models", "/models/mlp", "/workers/w", "/cache", "/objectives", "/cost", "/try", "/traces", "/compare",
    f"/traces/{TRACE}", "/api/summary", "/static/console.css", "/static/../app.py",
)  # fmt: skip
_CONSOLE: list[Console] = []


def _console():
    if not _CONSOLE:
        _CONSOLE.append(Console())
        atexit.register(_CONSOLE[0].close)
    return _CONSOLE[0]


@target(
    "console",
    [
        joined(bytes([number]), b"", b"model=mlp&range=2 h&min_ms=1&compare=x&page=2", b"", b"bytes=0-1,2-3")
        for number in range(len(PATHS))
    ]
    + [
        joined(bytes([7, 1]), b"", b"", b"model=mlp&shape:x=1,2&values:x=[1,2]&shape:t=1&values:t=[%22a%22]", b""),
        joined(bytes([12]), b"", b"", b"", b"bytes=" + b"0-," * 70),
        joined(bytes([4, 1]), b"", b"", b"scope=model&model=mlp&confirm=yes", b"bytes=-1"),
    ],
)
def console(data):
    """A page, or a 4xx with words; nothing that was sent is markup."""
    where, path, query, body, ranges, *_ = [*parts(data), *[b""] * 5]
    base = PATHS[(where[0] if where else 0) % len(PATHS)]
    if base == "/" and not path:
        base = "/models"
    method = "POST" if len(where) > 1 and where[1] % 2 else "GET"
    headers = ((b"range", ranges.replace(b"\n", b"").replace(b"\r", b"")), (b"accept", b"application/json"))
    # h11 refuses other bytes in a request line.
    query = bytes(byte for byte in query if 0x21 <= byte <= 0x7E)
    text = base + quote(path, safe="/")
    status, page = _console().ask(method, text, query, body, headers)
    # 307: to the same path without its last slash.
    assert status in (200, 206, 303, 307, 400, 404, 405, 409, 413, 416, 429, 502, 503, 504), (status, page[:500])
    if b"<script>alert" in body + query:
        assert "<script>alert" not in page


@target("metrics-request", [b"GET /metrics HTTP/1.1\r\naccept: application/openmetrics-text", b"POST /", b"GET"])
def metrics_request(data):
    server = MetricsServer("127.0.0.1:0", Metrics())
    answer = asyncio.run(server._answer(data.decode("latin-1")))
    assert answer.startswith(b"HTTP/1.1 ")


@target(
    "exposition",
    [
        b'ringmesh_requests_total{model="m",code="OK"} 5\nringmesh_x 1 2\n# HELP x\n',
        b'ringmesh_request_duration_seconds_bucket{le="0.5",outcome="a\\nb\\""} 1e3 # {trace_id="x"} 1\n',
    ],
    ValueError,
)
def exposition(data):
    """A second scrape says the same as the first."""
    reader = ExpositionReader()
    text = data.decode("utf-8", "replace")
    first = {(sample.name, sample.labels): repr(sample.value) for sample in reader.read(text)}
    assert {(sample.name, sample.labels): repr(sample.value) for sample in reader.read(text)} == first


_EXPORT = trace_service_pb2.ExportTraceServiceRequest()
_SCOPE = _EXPORT.resource_spans.add()
_SCOPE.resource.attributes.add(key="service.name").value.string_value = "ringmesh-router"
_SCOPE.scope_spans.add().spans.extend([span(7, model="mlp"), span(8, error="no")])


@target("spans", [_EXPORT.SerializeToString()], DecodeError)
def spans(data):
    """The store stays within its bounds, and each trace that it lists can be shown."""
    store = TraceStore(max_bytes=1 << 14, max_traces=3)
    request = trace_service_pb2.ExportTraceServiceRequest.FromString(data)
    asyncio.run(TraceReceiver(store)._export(request, None))
    assert store.bytes <= 1 << 14
    assert len(store) <= 3
    for summary in store.summaries():
        TraceQuery(text="a", min_ms=1).matches(summary)
        assert store.find(summary.trace_id) is not None
