"""What the console answers to requests that its own pages never send: words and a 4xx, never a failure of its own."""

import asyncio
import json
import threading
from collections import Counter
from urllib.parse import urlencode

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.router.v1 import router_pb2

from services.console import app
from services.console.data.fleet_watch import (
    FleetSnapshot,
    FleetWatch,
    LoadFailure,
    ModelReplica,
    ModelView,
    ServiceView,
)
from services.console.data.history import History
from services.console.data.ledger import LedgerReports
from services.console.data.scraper import Scraper
from services.console.data.sources import Sources
from services.console.data.trace_store import TraceStore
from services.console.pages import live
from services.runtime.rpc.access import Access
from tests.unit.console.data.test_history import sample
from tests.unit.console.data.test_trace_store import span

METADATA = v2.ModelMetadataResponse(
    name="mlp",
    inputs=[
        v2.ModelMetadataResponse.TensorMetadata(name="x", datatype="FP32", shape=[-1, 2]),
        v2.ModelMetadataResponse.TensorMetadata(name="t", datatype="BYTES", shape=[-1]),
    ],
)
TRACE = f"{7:032x}"


async def serve_router(calls):
    """A router that knows the inputs of any model, and answers with what it was sent."""

    async def metadata(_, __):
        return METADATA.SerializeToString()

    async def load(_, context):
        calls.append(("RepositoryModelLoad", dict(context.invocation_metadata())))
        return b""

    async def infer(data, context):
        calls.append(("ModelInfer", dict(context.invocation_metadata())))
        asked = v2.ModelInferRequest.FromString(data)
        made = v2.ModelInferResponse(raw_output_contents=asked.raw_input_contents)
        for tensor in asked.inputs:
            made.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        return made.SerializeToString()

    server = grpc.aio.server()
    methods = {"ModelMetadata": metadata, "ModelInfer": infer, "RepositoryModelLoad": load}
    handlers = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


class Console:
    """The application on a thread's event loop, asked without a socket."""

    def __init__(self, access=None):
        self.access = access or Access("127.0.0.1:0")
        # Of every call that reached the router: its method and its metadata.
        self.calls = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.run(self._start())

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    async def _start(self):
        self.router, address = await serve_router(self.calls)
        self.fleet = FleetWatch((address,), address, "the credential")
        worker = router_pb2.Worker(id="w", address="w:1", healthy=True, share=1)
        mlp = (ModelReplica("w", inference_pb2.ModelVersion(name="mlp", version="1")),)
        self.fleet.view = FleetSnapshot(
            (ServiceView(address, "", (worker,)),),
            ServiceView(address, ""),
            (ModelView("mlp", "1", "READY", "", mlp), ModelView("broken", "1", "UNAVAILABLE", "its file is truncated")),
            (LoadFailure("w", "broken", "1", "its file is truncated"),),
        )
        self.traces = TraceStore(max_bytes=1 << 20, max_traces=100)
        self.traces.add("ringmesh-router", span(7, model="mlp"))
        history = self.history = History(lambda: 1000.0)
        sources = Sources(self.fleet, history, Scraper({}, history), self.traces, "", LedgerReports(""))
        self.stopping = asyncio.Event()
        self.app = app.create(sources, self.stopping, (), self.access)

    def close(self):
        self.run(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _close(self):
        self.stopping.set()
        await self.fleet.close()
        await self.router.stop(0)

    def ask(self, method, path, query=b"", body=b"", headers=(), client="127.0.0.1"):
        """(status, text)"""
        return self.run(self.answer(method, path, query, body, headers, client))

    async def answer(
        self,
        method,
        path,
        query=b"",
        body=b"",
        headers=(),
        client="127.0.0.1",
        sent=None,
        got=None,
        origin=b"http://127.0.0.1",
    ):
        """`got`: receives the headers of the answer."""
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": "",
            "method": method, "path": path, "raw_path": path.encode(errors="replace"), "query_string": query,
            "headers": [(b"host", b"127.0.0.1"), (b"origin", origin), *headers],
            "client": (client, 1234) if client else None, "server": ("127.0.0.1", 80),
        }  # fmt: skip
        requests = [{"type": "http.request", "body": body, "more_body": False}]
        status, text = 0, bytearray()

        async def receive():
            if requests:
                return requests.pop()
            return await asyncio.Event().wait()

        async def send(message):
            nonlocal status
            status = message.get("status", status)
            if got is not None:
                got.update({name.decode(): value.decode() for name, value in message.get("headers", ())})
            text.extend(message.get("body", b""))
            if sent is not None:
                sent(status, bytes(text))

        await self.app(scope, receive, send)
        return status, text.decode()

    def try_out(self, **fields):
        return self.ask("POST", "/try", body=urlencode({"model": "mlp", **fields}).encode())


@pytest.fixture(scope="module")
def console():
    console = Console()
    yield console
    console.close()


GOOD = {"shape:x": "1, 2", "values:x": "[1, 2]", "shape:t": "1", "values:t": '["a"]'}


def test_a_request_that_is_right_is_answered(console):
    status, text = console.try_out(**GOOD, tenant="acme", **{"cache-control": "max-age=60"})
    assert status == 200
    assert "[1.0, 2.0]" in text


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("values:x", "[" * 100_000, "nested too deeply"),
        ("values:x", "[" * 500 + "1" + "]" * 500, "JSON list"),
        ("values:t", '{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deeply"),
        ("values:x", "[" + "9" * 5_000 + ", 1]", "JSON list"),
        ("values:t", '["\\ud800"]', "JSON list"),
        ("values:t", "[{}]", "JSON list"),
        ("values:x", "NaN", "JSON list"),
        ("shape:x", ",".join(["1"] * 50_000), "up to 64 dimensions, not 50,000"),
        ("shape:x", ",".join(["1"] * 65), "up to 64 dimensions, not 65"),
        ("shape:x", "0, 99999999999999999999", "elements here"),
        ("shape:x", "9" * 5_000, "whole numbers"),
        ("cache-control", "no-cache\r\nx: y", "printable ASCII"),
        ("cache-control", "größer", "printable ASCII"),
        ("cache-control", "x" * 300, "up to 256"),
        ("tenant", "a\0b", "printable ASCII"),
    ],
)
def test_what_cannot_be_sent_is_said_in_words(console, field, value, words):
    for zeros in ("0, 99999999999999999999", "1, 2"):
        fields = {**GOOD, "values:x": "zeros", "shape:x": zeros} if field == "shape:x" else GOOD
        status, text = console.try_out(**{**fields, field: value})
        assert status == 400
        assert words in text


def test_the_page_of_a_model_that_is_not_served_says_why(console):
    assert "Version 1: unavailable: its file is truncated." in console.ask("GET", "/models/broken")[1]


@pytest.mark.parametrize("path", ["/models/broken", "/workers/w"])
def test_load_errors_are_listed_with_their_worker(console, path):
    page = console.ask("GET", path)[1]
    assert "Load errors" in page
    assert "its file is truncated" in page
    assert "Load errors" not in console.ask("GET", "/models/mlp")[1]


def test_the_page_of_a_worker_shows_its_gpus(console):
    gpu = {"gpu": "0", "name": "NVIDIA H200"}
    values = {"use_ratio": 0.5, "memory_used_bytes": 35 << 30, "memory_total_bytes": 140 << 30, "power_watts": 312.0}
    console.history.add("w", [sample(f"ringmesh_gpu_{part}", gpu, value) for part, value in values.items()])
    page = console.ask("GET", "/workers/w")[1]
    assert all(text in page for text in ("NVIDIA H200", "50 %", "35 GiB", "140 GiB", "312 W", "GPU memory"))


def test_the_page_of_a_worker_says_when_the_memory_of_models_is_measured(console):
    assert "RINGMESH_MODEL_MEMORY_BYTES" in console.ask("GET", "/workers/w")[1]
    model = {"model": "mlp", "version": "1"}
    console.history.add("w", [sample("ringmesh_worker_model_bytes", model, 3 << 20)])
    page = console.ask("GET", "/workers/w")[1]
    assert "3 MiB" in page
    assert "RINGMESH_MODEL_MEMORY_BYTES" not in page


def test_a_worker_that_is_not_known_is_said_in_words(console):
    assert console.ask("GET", "/workers/nobody")[0] == 404


def test_the_hottest_keys_are_of_requests_that_were_answered(console):
    for trace in (21, 22):
        console.traces.add("ringmesh-router", span(trace, model="mlp", key="aaaa", cache="hit-local"))
    for trace in (23, 24, 25):
        console.traces.add("ringmesh-router", span(trace, model="mlp", key="bbbb", error="no input 'z'"))
    page = console.ask("GET", "/cache")[1]
    assert "<code>aaaa</code>" in page
    assert "bbbb" not in page


def test_two_traces_are_compared_span_by_span(console):
    for trace, end in ((31, 10), (32, 25)):
        console.traces.add("ringmesh-router", span(trace, 1, end=end, model="mlp", cache="miss"))
        console.traces.add("ringmesh-router", span(trace, 2, parent=1, end=end - 5, name="cache.shared"))
    console.traces.add("ringmesh-router", span(32, 3, parent=1, start=20, end=24, name="cache.fill"))
    listing = console.ask("GET", "/traces", f"model=mlp&compare={31:032x}".encode())[1]
    assert f'href="/compare?a={31:032x}&amp;b={32:032x}"' in listing
    status, page = console.ask("GET", "/compare", f"a={31:032x}&b={32:032x}".encode())
    assert status == 200
    assert page.count('<td class="n bad">15 ms</td>') == 2
    assert "cache.fill" in page
    assert console.ask("GET", "/compare", f"a={31:032x}&b=0".encode())[0] == 404


def test_a_histogram_stands_above_the_traces_and_leads_to_them(console):
    for trace, end in ((41, 3), (42, 300), (43, 310)):
        error = "broken" if trace == 43 else ""
        console.traces.add("ringmesh-router", span(trace, end=end, model="histogram", error=error))
    page = console.ask("GET", "/traces", b"model=histogram")[1]
    assert "&lt; 5 ms" in page
    assert 'title="2 traces, 1 failed"' in page
    link = "/traces?model=histogram&amp;min_ms=200&amp;max_ms=500"
    assert link in page
    found = console.ask("GET", "/traces", b"model=histogram&min_ms=200&max_ms=500")[1]
    assert "2 traces." in found


def test_a_page_that_does_not_exist_is_not_streamed_either(console):
    status, _ = console.ask("GET", "/traces/" + "0" * 32, headers=[(b"accept", b"text/event-stream")])
    assert status == 404


@pytest.mark.parametrize("path", ["/try", "/compare", "/audit", f"/traces/{TRACE}"])
def test_a_page_without_a_live_part_is_not_streamed(console, path):
    got = {}
    status, text = console.run(console.answer("GET", path, headers=[(b"accept", b"text/event-stream")], got=got))
    assert status < 500, text
    assert got["content-type"].startswith("text/html")


def test_a_client_that_has_left_is_no_fault_and_is_not_near(console):
    assert console.ask("GET", "/", client=None)[0] == 200
    assert console.ask("POST", "/cache", body=b"scope=everything&confirmed=yes", client=None)[0] == 403


PATHS = ["/", "/models", "/models/mlp", "/models/é\x00", "/cache", "/objectives", "/cost", "/try", "/traces",
         f"/traces/{TRACE}", "/traces/x", "/api/summary", "/static/console.css", "/static/../app.py", "/static/\x00",
         "/nowhere", "/compare", "/workers/w", "/workers/é\x00", "/sign-in", "/sign-out", "/audit"]  # fmt: skip
NAMES = ["span", "who", "method", "model", "text", "order", "sort", "status", "min_ms", "max_ms", "key", "tenant",
         "scope", "value", "cache-control", "range", "by", "a", "b", "compare", "action", "confirmed",
         *GOOD]  # fmt: skip
texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["mlp", "-1", "nan", "1e999", "0x", "key", "model", "everything", "[[[[]]]]", "1,2", "zeros", "\r\n"]
    ),
    st.integers().map(str),
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers(), st.lists).map(
        json.dumps
    ),
)
fields = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), texts, max_size=8)
# What a request line is made of.
printable = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=60).map(str.encode)
forms = fields.map(lambda made: urlencode({**GOOD, **made}, errors="replace").encode())


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["GET", "POST", "HEAD", "DELETE"]),
    st.sampled_from(PATHS),
    forms | printable,
    forms | st.binary(max_size=60),
    st.lists(st.tuples(st.sampled_from([b"accept", b"content-type", b"cookie"]), st.binary(max_size=20)), max_size=2),
)
def test_no_request_makes_a_page_fail(console, method, path, query, body, headers):
    status, text = console.ask(method, path, query, body, headers)
    assert 200 <= status < 500, text


async def follow(console, count, client):
    """Streams of one client, as (task, whether an event has come)."""
    made = []
    for _ in range(count):
        came = asyncio.get_running_loop().create_future()

        def sent(status, text, came=came):
            if text and not came.done():
                came.set_result(status)

        accept = [(b"accept", b"text/event-stream")]
        task = asyncio.create_task(console.answer("GET", "/", headers=accept, client=client, sent=sent))
        made.append((task, await asyncio.wait_for(came, 20)))
    return made


def test_a_client_with_many_live_pages_leaves_room_for_others(console, monkeypatch):
    monkeypatch.setattr(live, "MAX_STREAMS", 48)

    async def attack():
        tasks = []
        answers = Counter()
        # One client alone, then so many clients that together they would have all of them.
        for client, count in (("10.0.0.1", 100), ("10.0.0.2", 100), *((f"10.0.1.{n}", 1) for n in range(8))):
            for task, status in await follow(console, count, client):
                answers[client, status] += 1
                tasks.append(task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return answers

    answers = console.run(attack())
    assert answers["10.0.0.1", 200] == live.MAX_STREAMS_OF_ONE
    assert answers["10.0.0.1", 503] == 100 - live.MAX_STREAMS_OF_ONE
    assert answers["10.0.0.2", 200] >= 48 // 2 - 1
    assert all(answers[f"10.0.1.{n}", 200] == 1 for n in range(8))
    # All that left made room.
    assert console.run(follow(console, 1, "10.0.0.1"))[0][1] == 200


def test_values_that_are_shown_are_short(console):
    long = json.dumps(["a" * 5000])
    status, text = console.try_out(**{**GOOD, "values:t": long})
    assert status == 200
    assert "a" * 200 in text
    # Once in the form, and not in the answer.
    assert text.count("a" * 5000) == 1


def test_an_empty_tensor_is_sent(console):
    status, text = console.try_out(**{**GOOD, "shape:x": "0, 2", "values:x": "[]"})
    assert status == 200
    assert "[]" in text


@pytest.fixture
def another():
    """A console that has refused nothing yet: only some refusals a second are recorded."""
    console = Console()
    yield console
    console.close()


def test_only_browsers_of_an_admin_network_may_change_something(another, caplog):
    caplog.set_level("INFO")
    console = another
    fields = urlencode({"scope": "everything"}).encode()
    status, text = console.ask("POST", "/cache", body=fields, client="10.0.0.1")
    assert status == 403
    assert "RINGMESH_ADMIN_NETWORKS" in text
    assert console.ask("GET", "/cache", client="10.0.0.1")[0] == 200
    (recorded,) = [record.message for record in caplog.records if "POST /cache" in record.message]
    assert '"who": "browser"' in recorded
    assert '"peer": "10.0.0.1"' in recorded
