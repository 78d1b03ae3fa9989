"""The console of a running stack, asked over HTTP as a browser asks."""

import asyncio
import http.client
import urllib.error
import urllib.parse
import urllib.request

import pytest

from tests.system import processes
from tests.system.conftest import eventually
from tests.system.test_cache import fresh
from tests.system.test_tracing import traced


def get(url, **headers):
    """(status, headers, text)"""
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def post(url, headers, **fields):
    request = urllib.request.Request(url, urllib.parse.urlencode(fields).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def shows(url, *texts):
    return all(text in get(url)[2] for text in texts)


def test_the_fleet_page_names_every_part(stack, console):
    eventually(lambda: shows(f"{console}/", "2 of 2 workers", "worker-0", "worker-1", *stack.workers, stack.router))


def test_a_trace_that_is_not_there_is_said_in_words(console):
    status, _, page = get(f"{console}/traces/{'0' * 32}")
    assert status == 404
    assert "is not stored" in page
    assert "Traceback" not in page


def test_a_search_for_no_number_is_answered_in_words(console):
    status, _, page = get(f"{console}/traces?min_ms=fast")
    assert status == 200
    assert "“fast” is not a number" in page


def test_a_page_that_does_not_exist_is_said_in_words(console):
    status, headers, page = get(f"{console}/nowhere")
    assert (status, headers.get_content_type()) == (404, "text/html")
    assert "There is no page /nowhere." in page


def test_what_a_span_says_is_shown_and_never_run(stack, console):
    request = fresh()
    request.model_name = "<script>alert(1)</script>"
    with pytest.raises(Exception, match="NOT_FOUND"):
        asyncio.run(traced(stack.router, request))
    eventually(lambda: shows(f"{console}/traces?status=error", "&lt;script&gt;alert(1)"))
    assert "<script>alert" not in get(f"{console}/traces?status=error")[2]


@pytest.mark.parametrize("path", ["/", "/traces", "/nowhere", "/static/console.css"])
def test_nothing_may_be_loaded_or_run_from_elsewhere(console, path):
    _, headers, page = get(console + path)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "style=" not in page
    assert "http://" not in page.replace(console, "").replace("http://www.w3.org", "")


def test_a_name_that_is_not_ours_is_refused(console):
    """As a page that rebinds its own name to this address would come."""
    assert get(f"{console}/", Host="evil.example")[0] == 403
    assert get(f"{console}/", Host="localhost:8080")[0] == 200


def test_a_live_page_sends_its_content_and_then_what_changed(stack, console):
    address = urllib.parse.urlsplit(console).netloc
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/", headers={"Accept": "text/event-stream"})
    stream = connection.getresponse()
    assert stream.headers.get_content_type() == "text/event-stream"
    lines = []
    while not (lines and lines[-1] == ""):
        lines.append(stream.readline().decode().rstrip("\n"))
    assert lines[0].startswith("data: ")
    assert any("worker-0" in line for line in lines)
    assert not any("<html" in line for line in lines)
    while stream.readline().decode() not in ("data: <h1>Fleet</h1>\n", ":\n"):
        pass
    connection.close()


def test_a_console_without_a_router_says_so(engine):
    nowhere = processes.free_address()
    pages = processes.free_address()
    started = processes.start(
        "services.console",
        http_address=pages,
        routers=nowhere,
        cache_address=nowhere,
        metrics_targets=f"router={nowhere}",
        engine=engine,
    )
    try:
        texts = ("No router answers", "Router is down", "nothing listens there", "Process has no metrics")
        eventually(lambda: shows(f"http://{pages}/", *texts))
        assert shows(f"http://{pages}/traces", "No traces yet")
    finally:
        processes.stop(started)
    assert started.process.returncode == 0


PAGES = {
    "/models": ("mlp", "ready", "CPU", "random", "RandomNormalLike"),
    "/models/mlp": ("worker-0", "worker-1", "FP32", "[-1, 64]", "answers are cached"),
    "/models/random": ("not cached because",),
    "/models/pipeline": ("Ensemble", ">mlp</text>", ">doubled</text>", ">between</text>", "ensemble_scheduling"),
    "/models/mlp?range=24+h&by=worker": ("24.0 h ago", "Requests/s on the worker", "worker-1"),
    "/?range=2+h&by=model": ("2.0 h ago", "Response time, p99", "data-steps=", "mlp"),
    "/workers/worker-0": ("serves", "resident", "mlp", "CPUExecutionProvider", "reports no GPU"),
    "/cache": ("router", "shared", "By model and tenant"),
    "/objectives": (
        "Availability",
        "Latency",
        "99.9 %",
        "within 300 ms",
        "Burn rates as the routers measure them",
        "3d",
    ),
    "/cost": (
        "without the cache it would have been",
        "By tenant",
        "Largest changes",
        "The bill",
        "Expected for the month",
    ),
    "/audit?span=7d": ("Administrative actions", "Who", "Method"),
    "/try?model=mlp": ("Send", "FP32, any"),
}


@pytest.mark.parametrize("path", PAGES)
def test_every_page_tells_of_its_subject(stack, console, path):
    asyncio.run(traced(stack.router, fresh()))
    eventually(lambda: shows(console + path, *PAGES[path]))


def test_a_model_that_does_not_exist_is_said_in_words(console):
    status, _, page = get(f"{console}/models/nothing")
    assert status == 404
    assert "No router knows a model" in page


def sent(console, **fields):
    return post(f"{console}/try", {"Origin": console}, **fields)


def test_a_request_is_built_and_sent(stack, console):
    form = {"model": "add_sub", "shape:a": "1, 2", "values:a": "[1, 2]", "shape:b": "1, 2", "values:b": "[[10, 20]]"}
    status, page = sent(console, **form)
    assert status == 200
    assert "[11.0, 22.0]" in page
    assert ">miss<" in page
    assert ">hit-local<" in sent(console, **form)[1]
    assert ">miss<" in sent(console, **form, **{"cache-control": "no-cache"})[1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shape:x": "one"}, "the shape must be whole numbers"),
        ({"shape:x": "1, -64"}, "no negative sizes"),
        ({"values:x": "[1, 2]"}, "64 in all"),
        ({"values:x": "{"}, "a JSON list"),
        ({"shape:x": "1, 2", "values:x": "[1, 2]"}, "INVALID_ARGUMENT"),
        ({"tenant": "caf\u00e9"}, "printable ASCII"),
    ],
)
def test_what_is_no_request_is_said_in_words(stack, console, fields, words):
    status, page = sent(console, model="mlp", **fields)
    # A refusal of the router is an answer.
    assert status == (200 if words == "INVALID_ARGUMENT" else 400)
    assert words in page
    assert fields.get("values:x", "").replace('"', "&#34;") in page


@pytest.mark.parametrize("path", ["/try", "/cache", "/models/mlp"])
@pytest.mark.parametrize("origin", [{}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
def test_what_another_site_sends_is_refused(stack, console, origin, path):
    status, text = post(console + path, origin, model="mlp", action="unload", confirmed="yes")
    assert (status, text) == (403, "this request must come from one of the console's own pages\n")


def test_a_form_that_is_too_large_is_refused(stack, console):
    status, page = sent(console, model="mlp", **{"values:x": "1" * (3 << 20)})
    assert status == 413
    assert "up to 2 MiB" in page


def test_a_purge_is_confirmed_in_words(stack, console):
    form = {"model": "add_sub", "values:a": "[3, 4]", "values:b": "[1, 1]"}
    sent(console, **form)
    assert ">hit-local<" in sent(console, **form)[1]
    purge = {"scope": "model", "value": "add_sub"}
    status, page = post(f"{console}/cache", {"Origin": console}, **purge)
    assert status == 200
    assert "Purge the model add_sub?" in page
    assert ">hit-local<" in sent(console, **form)[1]
    status, page = post(f"{console}/cache", {"Origin": console}, **purge, confirmed="yes")
    assert "The model add_sub was purged" in page
    assert ">miss<" in sent(console, **form)[1]


def test_a_model_is_unloaded_and_loaded_once_that_is_confirmed(stack, console):
    url, form = f"{console}/models/add_sub", {"model": "add_sub", "values:a": "[5, 6]", "values:b": "[1, 1]"}
    page = post(url, {"Origin": console}, action="unload")[1]
    assert "Unload add_sub on all workers? Requests for it fail until it is loaded again." in page
    assert "[6.0, 7.0]" in sent(console, **form)[1]
    assert "add_sub was unloaded" in post(url, {"Origin": console}, action="unload", confirmed="yes")[1]
    try:
        eventually(lambda: "No worker serves the model add_sub" in sent(console, **form)[1])
        eventually(lambda: shows(url, "unavailable"))
    finally:
        assert "add_sub was loaded" in post(url, {"Origin": console}, action="load", confirmed="yes")[1]
    assert "[6.0, 7.0]" in sent(console, **form, **{"cache-control": "no-cache"})[1]


def test_an_action_on_a_model_that_fails_is_explained(stack, console):
    page = post(f"{console}/models/mlp", {"Origin": console}, action="delete")[1]
    assert "Choose whether to load or to unload the model." in page


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "Choose what to purge"),
        ({"scope": "model"}, "Choose what to purge"),
        ({"scope": "key", "value": "z"}, "not a key"),
    ],
)
def test_a_purge_of_nothing_is_said_in_words(stack, console, fields, words):
    assert words in post(f"{console}/cache", {"Origin": console}, **fields)[1]


def test_the_fleet_page_tells_what_changed(stack, console):
    eventually(lambda: shows(f"{console}/", "Recent changes", "joined"))
