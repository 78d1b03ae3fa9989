"""What a scrape of the running stack says."""

import json
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ringmesh.cache.v1 import cache_pb2
from ringmesh.health.v1 import health_pb2
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.router.v1 import router_pb2

from tests.system.conftest import eventually
from tests.system.processes import free_address
from tests.system.test_cache import fresh
from tests.unit.runtime.telemetry.test_metrics import documented

INFER = "/inference.GRPCInferenceService/ModelInfer"


def addresses(stack):
    return json.loads((Path(stack.state) / "stack.json").read_text())["metrics"]


def scrape(address):
    """Values by (name, labels)."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(scraped, name, **labels):
    """The sum over the series that have these labels."""
    wanted = set(labels.items())
    return sum(v for (n, found), v in scraped.items() if n == name and wanted <= found)


def call(address, request):
    with grpc.insecure_channel(address) as channel:
        return channel.unary_unary(INFER)(request.SerializeToString(), timeout=120)


def test_a_scrape_tells_hits_from_misses_and_errors(stack):
    router = addresses(stack)["router"]
    before = scrape(router)
    request, wrong, unknown = fresh(), fresh(), fresh()
    wrong.inputs[0].name = "z"
    unknown.model_name = "no such model"
    for _ in range(3):
        call(stack.router, request)
    for bad in (wrong, unknown):
        with pytest.raises(grpc.RpcError):
            call(stack.router, bad)
    after = scrape(router)

    def grew(name, **labels):
        return value(after, name, **labels) - value(before, name, **labels)

    model = request.model_name
    name = "ringmesh_requests_total"
    assert grew(name, model=model, code="OK", outcome="miss", method="ModelInfer") == 1
    assert grew(name, model=model, code="OK", outcome="hit-local") == 2
    assert grew(name, model=model, code="INVALID_ARGUMENT", outcome="error") == 1
    assert grew(name, model="other", code="NOT_FOUND") == 1
    assert value(after, name, model="no such model") == 0
    assert grew("ringmesh_request_duration_seconds_count", model=model, outcome="hit-local") == 2
    assert grew("ringmesh_request_duration_seconds_sum", model=model, outcome="miss") > 0
    assert grew("ringmesh_cache_lookups_total", tier="local", result="hit") == 2
    assert value(after, "ringmesh_requests_in_flight") == 0


METHODS = [
    # process, method, request, code
    ("router", "inference.GRPCInferenceService/ModelReady", v2.ModelReadyRequest(name="mlp"), "OK"),
    ("router", "inference.GRPCInferenceService/ModelMetadata", v2.ModelMetadataRequest(name="none"), "NOT_FOUND"),
    ("router", "ringmesh.router.v1.RouterService/GetRing", router_pb2.GetRingRequest(), "OK"),
    ("worker-0", "inference.GRPCInferenceService/ModelConfig", v2.ModelConfigRequest(name="none"), "NOT_FOUND"),
    ("worker-0", "ringmesh.inference.v1.InferenceWorkerService/Describe", inference_pb2.DescribeRequest(), "OK"),
    ("cache", "ringmesh.cache.v1.CacheService/Stats", cache_pb2.StatsRequest(), "OK"),
    ("cache", "ringmesh.cache.v1.CacheService/Get", cache_pb2.GetRequest(), "INVALID_ARGUMENT"),
    ("cache", "grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(), "OK"),
]


@pytest.mark.both_engines
@pytest.mark.parametrize(("process", "method", "request_", "code"), METHODS)
def test_calls_of_every_method_are_counted_by_how_they_ended(stack, process, method, request_, code):
    served = {"router": stack.router, "cache": stack.cache, "worker-0": stack.workers[0]}[process]

    def counted():
        return value(scrape(addresses(stack)[process]), "ringmesh_rpc_calls_total", method=method, code=code)

    before = counted()
    with grpc.insecure_channel(served) as channel:
        ended = channel.unary_unary(f"/{method}").future(request_.SerializeToString(), timeout=120)
        assert ended.code().name == code
    eventually(lambda: counted() > before)  # grpcio counts a call after its answer


@pytest.mark.both_engines
def test_streams_are_counted_when_they_end(stack):
    method = "inference.GRPCInferenceService/ModelStreamInfer"

    def counted(code):
        return value(scrape(addresses(stack)["router"]), "ringmesh_rpc_calls_total", method=method, code=code)

    before = {code: counted(code) for code in ("OK", "CANCELLED")}
    going_on = threading.Event()

    def requests():
        yield fresh().SerializeToString()
        for _ in range(8):
            yield fresh("slow").SerializeToString()
        going_on.wait(120)

    with grpc.insecure_channel(stack.router) as channel:
        infer = channel.stream_stream(f"/{method}")
        assert len(list(infer(iter([fresh().SerializeToString()]), timeout=120))) == 1
        left = infer(requests(), timeout=120)
        next(left)
        # Something is under way when the caller leaves: of one who leaves an idle stream, grpcio first says that no
        # more requests come, and the stream may end well before it says why.
        eventually(lambda: value(scrape(addresses(stack)["router"]), "ringmesh_requests_in_flight") > 0)
        left.cancel()
        going_on.set()
        for code, count in before.items():
            # More than one where a stream of an earlier test ends only now.
            eventually(lambda code=code, count=count: counted(code) > count)


def test_errors_are_counted_by_their_type(stack):
    router = addresses(stack)["router"]
    wrong, unknown = fresh(), fresh()
    wrong.raw_input_contents[0] = b"four"  # what only a worker sees
    unknown.model_name = "no such model"

    def counted():
        scraped = scrape(router)
        workers = [scrape(address) for name, address in addresses(stack).items() if name.startswith("worker")]
        return (
            value(scraped, "ringmesh_errors_total", type="invalid_input", model=wrong.model_name),
            value(scraped, "ringmesh_errors_total", type="unknown_model", model="other"),
            sum(value(worker, "ringmesh_worker_errors_total", type="invalid_input") for worker in workers),
        )

    before = counted()
    for bad in (wrong, unknown):
        with pytest.raises(grpc.RpcError):
            call(stack.router, bad)
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [1, 1, 1]


def test_a_scrape_of_a_worker_tells_what_it_ran(stack):
    workers = [address for name, address in addresses(stack).items() if name.startswith("worker")]
    request = fresh()

    def ran():
        scraped = [scrape(worker) for worker in workers]
        return [
            sum(value(s, name, model=request.model_name, **labels) for s in scraped)
            for name, labels in (
                ("ringmesh_worker_requests_total", {"result": "ok"}),
                ("ringmesh_worker_stage_seconds_count", {"stage": "compute"}),
                ("ringmesh_worker_batch_rows_count", {}),
            )
        ]

    before = ran()
    call(stack.router, request)
    assert [after - was for was, after in zip(before, ran(), strict=True)] == [1, 1, 1]


def test_every_process_serves_metrics_and_only_those_of_the_table(stack):
    table = {family.name: family for family in documented()}
    assert set(addresses(stack)) == {"router", "cache", "console", "ledger", "worker-0", "worker-1"}
    seen = set()
    for address in addresses(stack).values():
        for name, labels in scrape(address):
            for suffix in ("", "_bucket", "_sum", "_count"):
                family = table.get(name.removesuffix(suffix))
                if family is not None:
                    assert {label for label, _ in labels} - {"le"} == set(family.labels)
                    seen.add(family.name)
                    break
            else:
                assert name.endswith("_created"), f"{name} is not in docs/metrics.md"
    assert len(seen) > 25


def test_tritons_names_are_an_option_of_routers_and_workers(stack, start_worker, start_router):
    assert not [name for address in addresses(stack).values() for name, _ in scrape(address) if name.startswith("nv_")]
    metrics = [free_address(), free_address()]
    worker = start_worker("worker-triton", metrics_address=metrics[0], triton_metrics=True)
    router = start_router([worker.address], None, metrics_address=metrics[1], triton_metrics=True)
    request = fresh()
    for _ in range(3):
        call(router.address, request)

    def sums():
        names = ("nv_inference_request_success", "nv_inference_count", "nv_cache_num_hits_per_model")
        scraped = [scrape(address) for address in metrics]
        return [sum(value(s, f"{name}_total", model=request.model_name) for s in scraped) for name in names]

    assert sums() == [3, 1, 2]


@pytest.mark.parametrize("module", ["router", "cache"])
def test_a_taken_metrics_port_is_told_in_one_line(module):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = {"RINGMESH_METRICS_ADDRESS": address, "RINGMESH_ADDRESS": "127.0.0.1:0"}
        done = subprocess.run([sys.executable, "-m", module], env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert address in last
    assert "RINGMESH_METRICS_ADDRESS" in last
    assert "Traceback" not in done.stderr
