import asyncio
import pkgutil
import socket
import struct
import threading
from collections import Counter as Counts
from importlib import import_module
from pathlib import Path

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as prometheus
from ringmesh.oip.v2 import grpc_service_pb2 as v2

import cache
import router
import services
from router.accounting.request_metrics import OK, RequestMetrics
from services.runtime.rpc import exposition
from services.runtime.rpc.exposition import MetricsServer, expose
from services.runtime.rpc.server import StartError
from services.runtime.telemetry import triton_metrics
from services.runtime.telemetry.metrics import BOUNDS_NS, OTHER, Buckets, Counter, Family, Histogram, Metrics, Sample
from services.runtime.telemetry.process_metrics import ProcessMetrics

TABLE = Path(__file__).parents[4] / "docs/metrics.md"
EVENTS = Family("events_total", "counter", "what happened", ("kind",))
TIMES = Family("times_seconds", "histogram", "how long")


def declared():
    """Every Family that a module of ours names."""
    for package in (router, cache, services):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                yield from (value for value in vars(import_module(found.name)).values() if isinstance(value, Family))


def documented():
    for line in TABLE.read_text().splitlines():
        if line.startswith("| `"):
            name, kind, labels, meaning, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            yield Family(name.strip("`"), kind, meaning, tuple(labels.replace("`", "").split(", ")) if labels else ())


def test_the_table_says_of_every_metric_what_the_code_says():
    assert sorted(documented(), key=str) == sorted(set(declared()), key=str)


def under_tritons_names():
    """The samples of a worker (four rows in two batches, three failures) and of a router (a hit and a miss)."""
    duration = v2.StatisticDuration
    on_worker = v2.ModelStatistics(
        name="mlp",
        version="1",
        inference_count=4,
        execution_count=2,
        inference_stats=v2.InferStatistics(
            success=duration(count=3, ns=9_000_000),
            queue=duration(count=3, ns=1_000_000),
            compute_input=duration(count=3, ns=2_000_000),
            compute_infer=duration(count=3, ns=5_000_000),
            compute_output=duration(count=3, ns=1_500),
        ),
    )
    yield triton_metrics.computed(on_worker, {"overload": 1, "execution": 1, "internal": 1}, pending=7)
    requests = RequestMetrics()
    requests.count(("infer", "mlp", "1", "", OK, "hit-local"), 50_000, 900)
    requests.count(("infer", "mlp", "1", "", OK, "miss"), 3_000_000, 900)
    yield requests.triton_samples()


@pytest.mark.parametrize(("accept", "parse"), [("", prometheus), ("application/openmetrics-text", open_metrics)])
def test_the_sum_over_processes_is_what_triton_reports(accept, parse):
    sums = Counts()
    for samples in under_tritons_names():
        text, _ = expose(samples, accept)
        for family in parse(text.decode()):
            assert family.type in ("counter", "gauge", "unknown")
            for sample in family.samples:
                assert (sample.labels["model"], sample.labels["version"]) == ("mlp", "1")
                sums[sample.name.removesuffix("_total"), sample.labels.get("reason", "")] += sample.value
    assert sums == {
        ("nv_inference_request_success", ""): 4,
        ("nv_inference_request_failure", "REJECTED"): 1,
        ("nv_inference_request_failure", "CANCELED"): 0,
        ("nv_inference_request_failure", "BACKEND"): 1,
        ("nv_inference_request_failure", "OTHER"): 1,
        ("nv_inference_count", ""): 4,
        ("nv_inference_exec_count", ""): 2,
        ("nv_inference_request_duration_us", ""): 9050,
        ("nv_inference_queue_duration_us", ""): 1000,
        ("nv_inference_compute_input_duration_us", ""): 2000,
        ("nv_inference_compute_infer_duration_us", ""): 5000,
        ("nv_inference_compute_output_duration_us", ""): 1,
        ("nv_inference_pending_request_count", ""): 7,
        ("nv_cache_num_hits_per_model", ""): 1,
        ("nv_cache_num_misses_per_model", ""): 1,
        ("nv_cache_hit_duration_per_model", ""): 50,
        ("nv_cache_miss_duration_per_model", ""): 3000,
    }


def test_names_are_those_that_prometheus_wants():
    for family in set(declared()):
        assert family.name.startswith("ringmesh_")
        assert family.name.endswith("_total") == (family.kind == "counter")


@given(st.lists(st.integers(0, 10**12)))
def test_a_histogram_keeps_every_observation_in_the_bucket_it_belongs_to(durations):
    histogram = Histogram()
    for ns in durations:
        histogram.observe(ns)
    assert sum(histogram.counts) == len(durations)
    assert histogram.sum_ns == sum(durations)
    for upto, bound in enumerate(BOUNDS_NS):
        assert sum(histogram.counts[: upto + 1]) == sum(ns <= bound for ns in durations)


@pytest.mark.parametrize(
    ("accept", "parse"), [("", prometheus), ("application/openmetrics-text; version=1.0.0", open_metrics)]
)
def test_both_formats_are_read_by_their_parsers(accept, parse):
    histogram = Histogram()
    histogram.observe(42_000)
    text, _ = expose([Sample(EVENTS, ('a"b\\c\nd',), 3), Sample(TIMES, (), histogram.buckets())], accept)
    found = {family.name: family.samples for family in parse(text.decode())}
    assert [(s.labels, s.value) for s in found["events"]] == [({"kind": 'a"b\\c\nd'}, 3.0)]
    buckets = {s.labels["le"]: s.value for s in found["times_seconds"] if s.name.endswith("_bucket")}
    assert (buckets["3e-05"], buckets["5e-05"], buckets["+Inf"]) == (0, 1, 1)


def test_series_are_bounded_whatever_callers_send():
    requests = RequestMetrics()
    for number in range(2000):
        requests.count(("ModelInfer", f"m{number}", "1", f"tenant{number}", OK, "miss"), 1, 1)
    series = [s for s in requests.samples() if s.family.name == "ringmesh_requests_total"]
    assert len(series) < 500
    assert sum(s.value for s in series) == 2000
    assert any(s.labels[1] == OTHER and s.labels[3] == OTHER for s in series)


def answered(requests, ns, times=1, model="m"):
    slow = [requests.count(("ModelInfer", model, "1", "", OK, "miss"), ns, 1) for _ in range(times)]
    return slow[-1]


def test_what_is_above_the_p99_of_its_model_is_slow():
    requests = RequestMetrics()
    assert not answered(requests, 10**9)  # nothing is known yet
    answered(requests, 1_000_000, 1000)
    requests.mark()
    assert answered(requests, 2_000_000)
    assert not answered(requests, 900_000)
    assert not answered(requests, 10**9, model="another")


def test_a_model_that_becomes_slower_is_not_slow_for_ever():
    requests = RequestMetrics()
    for _ in range(30):
        answered(requests, 1_000_000, 200)
        requests.mark()
    assert answered(requests, 50_000_000)
    for _ in range(30):
        answered(requests, 50_000_000, 200)
        requests.mark()
    assert answered(requests, 50_000_001)
    assert not answered(requests, 50_000_000)


def test_when_all_become_slower_some_of_each_model_are_slow_until_the_next_mark():
    requests = RequestMetrics()
    models = ("m", "another")
    for model in models:
        answered(requests, 1_000_000, 10_000, model)
    requests.mark()
    for model in models:
        labels = ("ModelInfer", model, "1", "", OK, "miss")
        assert sum(requests.count(labels, 2_000_000, 1) for _ in range(10_000)) == 50
    requests.mark()
    assert not answered(requests, 2_000_000)
    assert answered(requests, 2_000_001)


def test_a_kept_request_is_an_exemplar_in_its_bucket():
    requests = RequestMetrics()
    labels = ("ModelInfer", "m", "1", "", OK, "miss")
    requests.count(labels, 42_000, 1)
    requests.exemplify(labels, 42_000, "ab" * 16, 10**18)
    text, _ = expose(requests.samples(), "application/openmetrics-text; version=1.0.0")
    (line,) = [line for line in text.decode().splitlines() if "trace_id" in line]
    assert 'le="5e-05"' in line
    assert f'{{trace_id="{"ab" * 16}"}} 4.2e-05' in line


def test_a_counter_is_bounded_and_loses_nothing():
    counter = Counter(EVENTS)
    for number in range(5000):
        counter.add(str(number))
    samples = list(counter.samples())
    assert len(samples) < 600
    assert sum(sample.value for sample in samples) == 5000


def test_unknown_bounds_are_refused():
    with pytest.raises(ValueError, match="zip"):
        expose([Sample(TIMES, (), Buckets((1.0,), (1,), 1.0))], "")


async def get(port, head):
    import asyncio

    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


@pytest.fixture
async def served():
    metrics = Metrics()
    ProcessMetrics("test", "none", metrics).start()
    server = MetricsServer("127.0.0.1:0", metrics)
    yield await server.start()
    server.close()


async def test_metrics_of_the_process_are_served(served):
    head, _, body = (await get(served, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    names = {family.name for family in prometheus(body.decode())}
    assert {"ringmesh_process_cpu_seconds", "ringmesh_event_loop_lag_seconds", "ringmesh_host_memory_bytes"} <= names


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
        (b"\r\n\r\n", b"404"),
        (b"GET /metrics", b""),
        (b"x" * 20_000, b""),
        (b"", b""),
    ],
)
async def test_what_is_not_a_scrape_is_refused_and_harms_nothing(served, request_head, status):
    assert (await get(served, request_head))[9:12] == status
    assert b"200 OK" in await get(served, b"GET /metrics HTTP/1.1\r\n\r\n")


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:x", "127.0.0.1:99999", "1.2.3.4:80"])
async def test_an_address_that_cannot_be_had_is_told(address):
    with pytest.raises(StartError, match="RINGMESH_METRICS_ADDRESS"):
        await MetricsServer(address, Metrics()).start()


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_scraper_that_does_not_read_is_disconnected(monkeypatch):
    monkeypatch.setattr(exposition, "_SECONDS", 1)
    metrics = Metrics()
    # More than the kernel buffers.
    metrics.add(lambda: (Sample(EVENTS, (str(number) + "a" * 10_000,), 1) for number in range(2000)))
    server = MetricsServer("127.0.0.1:0", metrics)
    port = await server.start()
    before = open_files()
    with socket.create_connection(("127.0.0.1", port)) as scraper:
        scraper.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(60):
            assert await asyncio.to_thread(scraper.recv, 1) == b"H"
            while server._connections or open_files() > before + 1:
                await asyncio.sleep(0.01)
    server.close()


def test_a_scraper_that_leaves_before_the_answer_is_no_fault():
    faults = []
    left = threading.Event()

    async def scrape():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        metrics = Metrics()
        metrics.add_slow(lambda: iter([left.wait(60)][1:]))
        server = MetricsServer("127.0.0.1:0", metrics)
        port = await server.start()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(60):
            while not server._one.locked():
                await asyncio.sleep(0.001)
            before = open_files()
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            while open_files() > before - 2:
                await asyncio.sleep(0.001)
            left.set()
            while server._connections:
                await asyncio.sleep(0.001)
        server.close()

    uvloop.run(scrape())
    assert faults == []


async def test_a_taken_port_is_told(served):
    with pytest.raises(StartError, match=f"127.0.0.1:{served}"):
        await MetricsServer(f"127.0.0.1:{served}", Metrics()).start()
