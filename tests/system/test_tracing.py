"""One trace from the caller's span to the ONNX Runtime run, whatever is or is not there to collect it."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from concurrent import futures

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from services.runtime.telemetry.worker_spans import EXECUTE
from services.runtime.w3c import new_span_id
from tests.system import processes
from tests.system.processes import free_address
from tests.system.test_cache import fresh

INFER = "/inference.GRPCInferenceService/ModelInfer"
# Spans of calls are named by service and method, as both ends of a call have one name.
MODEL_INFER = "inference.GRPCInferenceService/ModelInfer"
SERVER, FORWARD, WORKER = "router ModelInfer", "router Execute", "worker Execute"


async def traced(address, request, *, sampled=True):
    """(trace id, the caller's span id, trailing metadata)"""
    async with grpc.aio.insecure_channel(address) as channel:
        return await traced_on(channel, request, sampled=sampled)


async def traced_on(channel, request, *, sampled=True):
    trace_id, span_id = new_span_id() * 2, new_span_id()
    context = (("traceparent", f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}"),)
    call = channel.unary_unary(INFER)(request.SerializeToString(), metadata=context, timeout=60)
    await call
    return trace_id, span_id, dict(await call.trailing_metadata())


def spans(folder, trace_id):
    found = []
    for file in folder.glob("*.jsonl"):
        whole, _, _ = file.read_text().rpartition("\n")  # the last line may still be written
        found += [json.loads(line) for line in whole.splitlines() if trace_id in line]
    return [span for span in found if span["trace_id"] == trace_id]  # others link to it


def named(found):
    """By name, without the package; a call's with the service."""
    named = {}
    for span in found:
        service, _, method = span["name"].rpartition("/")
        named[f"{span['service'].removeprefix('ringmesh-')} {method}" if service else method] = span
    return named


async def complete(folder, trace_id, names):
    async with asyncio.timeout(60):
        while not names <= named(spans(folder, trace_id)).keys():
            await asyncio.sleep(0.05)
    return named(spans(folder, trace_id))


async def so_many(folder, trace_id, counts):
    """The spans, once there are so many of each of these names."""
    async with asyncio.timeout(60):
        while True:
            found = spans(folder, trace_id)
            if counts.items() <= Counter(span["name"] for span in found).items():
                return found
            await asyncio.sleep(0.05)


MISS = {
    SERVER,
    "cache.local",
    "cache.shared",
    FORWARD,
    WORKER,
    "queue",
    "batch",
    "onnxruntime run",
}


@pytest.mark.both_engines
async def test_a_trace_of_a_miss_shows_every_hop_under_the_callers_span(stack):
    trace_id, caller, told = await traced(stack.router, fresh())
    assert told["ringmesh-trace-id"] == trace_id
    found = await complete(stack.trace_dir, trace_id, MISS)
    parents = {name: span["parent_id"] for name, span in found.items()}
    assert parents[SERVER] == caller
    router = found[SERVER]["span_id"]
    assert {parents[name] for name in ("cache.local", "cache.shared", FORWARD)} == {router}
    assert parents[WORKER] == found[FORWARD]["span_id"]
    worker = found[WORKER]["span_id"]
    assert {parents[name] for name in ("queue", "batch")} == {worker}
    assert parents["onnxruntime run"] == found["batch"]["span_id"]
    assert found["onnxruntime run"]["attributes"]["ringmesh.provider"] == "CPUExecutionProvider"
    for inner, outer in (("onnxruntime run", WORKER), (FORWARD, SERVER)):
        assert found[outer]["start_ns"] <= found[inner]["start_ns"] <= found[inner]["end_ns"] <= found[outer]["end_ns"]


async def test_a_trace_of_a_hit_ends_at_the_cache(stack):
    request = fresh()
    await traced(stack.router, request)
    trace_id, _, _ = await traced(stack.router, request)
    found = await complete(stack.trace_dir, trace_id, {SERVER})
    assert set(found) == {SERVER}
    told = found[SERVER]["attributes"]
    assert told["ringmesh.cache.outcome"] == "hit-local"
    assert told["ringmesh.cache.tier"] == "local"
    assert told["ringmesh.cache.age_ms"] >= 0
    assert told["rpc.response.status_code"] == "OK"


async def test_the_routing_decision_is_told(stack):
    trace_id, _, told = await traced(stack.router, fresh())
    attempt = (await complete(stack.trace_dir, trace_id, MISS))[FORWARD]
    first = attempt["events"][0]["attributes"]
    assert first["ringmesh.rank"] == 0
    assert attempt["events"][-1]["attributes"]["ringmesh.worker.id"] == told["ringmesh-worker"]
    assert attempt["events"][-1]["attributes"]["ringmesh.taken"]
    assert attempt["kind"] == "client"
    assert f"{attempt['attributes']['server.address']}:{attempt['attributes']['server.port']}" in stack.workers


async def test_what_the_caller_says_beside_its_trace_is_kept(stack):
    trace_id, span_id = new_span_id() * 2, new_span_id()
    sent = (
        ("traceparent", f"00-{trace_id}-{span_id}-01"),
        ("baggage", "order=4711, who=an%20na;p=1"),
        ("ringmesh-tenant", "shop"),
    )
    async with grpc.aio.insecure_channel(stack.router) as channel:
        await channel.unary_unary(INFER)(fresh().SerializeToString(), metadata=sent)
    told = (await complete(stack.trace_dir, trace_id, {SERVER}))[SERVER]["attributes"]
    assert (told["baggage.order"], told["baggage.who"]) == ("4711", "an na")
    assert told["ringmesh.tenant"] == "shop"


@pytest.fixture(scope="module")
def quiet(stack, engine, tmp_path_factory):
    """A router that samples nothing by itself, and its folder of spans."""
    folder = tmp_path_factory.mktemp("quiet")
    workers = ",".join(stack.workers)
    router = processes.start("router", workers=workers, engine=engine, trace_dir=folder, trace_ratio=0)
    yield router, folder
    processes.stop(router)


async def test_a_caller_that_does_not_sample_is_respected(quiet):
    router, folder = quiet
    trace_id, _, told = await traced(router.address, fresh(), sampled=False)
    assert told["ringmesh-trace-id"] == trace_id
    marker, _, _ = await traced(router.address, fresh())
    await complete(folder, marker, MISS - {"cache.shared"})  # sent later, so the other would be there by now
    assert spans(folder, trace_id) == []


async def test_a_request_that_fails_is_kept_whole_though_it_is_not_sampled(quiet):
    router, folder = quiet
    request = fresh()
    request.raw_input_contents[0] = b"four"  # what only a worker sees
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await traced(router.address, request, sampled=False)
    trace_id = dict(caught.value.trailing_metadata())["ringmesh-trace-id"]
    found = await complete(folder, trace_id, {SERVER, FORWARD, WORKER})
    assert found[SERVER]["attributes"]["error.type"] == "INVALID_ARGUMENT"
    assert "4 bytes" in found[WORKER]["error"]


async def test_a_slow_request_is_kept_whole_though_it_is_not_sampled(quiet):
    router, folder = quiet
    request = fresh("slow")
    async with grpc.aio.insecure_channel(router.address) as channel:
        infer = channel.unary_unary(INFER)

        async def slow_one():
            # Many hits, so that a miss is far above their 99th percentile once that has been taken.
            for _ in range(200):
                await infer(request.SerializeToString())
            call = infer(fresh("slow").SerializeToString())
            await call
            return dict(await call.trailing_metadata())["ringmesh-trace-id"]

        slow, kept = [], []
        async with asyncio.timeout(120):
            while not kept:
                slow.append(await slow_one())
                await asyncio.sleep(0.3)
                kept = [trace_id for trace_id in slow if spans(folder, trace_id)]
    found = await complete(folder, kept[0], {SERVER, FORWARD, WORKER, "batch", "onnxruntime run"})
    assert found[SERVER]["error"] == ""


async def test_a_batch_links_the_requests_that_it_served(quiet):
    router, folder = quiet
    rounds = 0
    linked = set()
    while not linked:
        rounds += 1
        assert rounds < 20
        ids = [
            trace_id for trace_id, _, _ in await asyncio.gather(*(traced(router.address, fresh()) for _ in range(16)))
        ]
        found = [await complete(folder, trace_id, {"batch", FORWARD}) for trace_id in ids]
        forwards = {(named["batch"]["trace_id"], named[FORWARD]["span_id"]) for named in found}
        for named_spans in found:
            batch = named_spans["batch"]
            links = {tuple(link) for link in batch["links"]}
            assert len(links) == batch["attributes"]["ringmesh.batch.requests"]
            assert links <= forwards
            if len(links) > 1:
                linked |= links


async def test_a_request_that_joined_another_links_to_it(stack):
    request = fresh("slow")
    async with grpc.aio.insecure_channel(stack.router) as channel:
        await channel.channel_ready()  # so that they come together, before the first is computed
        asked = await asyncio.gather(*(traced_on(channel, request) for _ in range(4)))
    found = [(await complete(stack.trace_dir, trace_id, {SERVER}))[SERVER] for trace_id, _, _ in asked]
    outcomes = {span["trace_id"]: span["attributes"]["ringmesh.cache.outcome"] for span in found}
    assert sorted(outcomes.values()) == ["joined", "joined", "joined", "miss"]
    (leader,) = [span for span in found if outcomes[span["trace_id"]] == "miss"]
    assert leader["links"] == []
    for span in found:
        if span is not leader:
            assert span["links"] == [[leader["trace_id"], leader["span_id"]]]


async def test_the_steps_of_an_ensemble_are_told_each_with_its_run(stack):
    request = fresh()
    request.model_name, request.inputs[0].name = "pipeline", "in"
    trace_id, _, told = await traced(stack.router, request)
    names = ("ensemble step", "queue", "batch", "onnxruntime run")
    found = await so_many(stack.trace_dir, trace_id, dict.fromkeys(names, 2) | {MODEL_INFER: 1, EXECUTE: 2})
    (worker,) = [span for span in found if span["name"].endswith("/Execute") and span["kind"] == "server"]
    steps = [span for span in found if span["name"] == "ensemble step"]
    assert [step["attributes"]["ringmesh.model.name"] for step in steps] == ["mlp", "doubled"]
    assert {step["parent_id"] for step in steps} == {worker["span_id"]}
    for step in steps:
        children = [span for span in found if span["parent_id"] == step["span_id"]]
        assert {span["name"] for span in children} == {"queue", "batch"}
        assert all(step["start_ns"] <= span["start_ns"] <= span["end_ns"] <= step["end_ns"] for span in children)
    assert {s["attributes"]["ringmesh.provider"] for s in found if s["name"] == "onnxruntime run"} == {
        "CPUExecutionProvider"
    }
    assert told["ringmesh-provider"] == "ensemble"


async def test_what_ran_the_model_is_told_of_what_was_computed(stack):
    request = fresh()
    trace_id, _, told = await traced(stack.router, request)
    assert told["ringmesh-provider"] == "CPUExecutionProvider"
    found = await complete(stack.trace_dir, trace_id, {SERVER})
    assert found[SERVER]["attributes"]["ringmesh.provider"] == "CPUExecutionProvider"
    _, _, told = await traced(stack.router, request)
    assert (told["ringmesh-cache"], told.get("ringmesh-provider")) == ("hit-local", None)
    _, _, told = await traced(stack.workers[0], fresh())
    assert told["ringmesh-provider"] == "CPUExecutionProvider"


async def test_a_failure_is_marked_in_its_trace(stack):
    request = fresh()
    request.raw_input_contents[0] = b"four"  # what only a worker sees
    trace_id, span_id = new_span_id() * 2, new_span_id()
    async with grpc.aio.insecure_channel(stack.router) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary(INFER)(
                request.SerializeToString(), metadata=(("traceparent", f"00-{trace_id}-{span_id}-01"),)
            )
    found = await complete(stack.trace_dir, trace_id, {SERVER, WORKER})
    assert "4 bytes" in found[SERVER]["error"]
    assert "4 bytes" in found[WORKER]["error"]


@pytest.mark.parametrize("broken", ["", "00-zz-11-01", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "x" * 200])
async def test_a_broken_traceparent_begins_a_new_trace(stack, broken):
    async with grpc.aio.insecure_channel(stack.router) as channel:
        call = channel.unary_unary(INFER)(fresh().SerializeToString(), metadata=(("traceparent", broken),))
        await call
        trace_id = dict(await call.trailing_metadata())["ringmesh-trace-id"]
    assert int(trace_id, 16) > 0


async def test_ringmesh_trace_shows_the_hops_of_a_trace(stack):
    trace_id, _, _ = await traced(stack.router, fresh())
    await complete(stack.trace_dir, trace_id, MISS)
    shown = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "services.cli", "trace", trace_id, "--state", stack.state],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    for name in MISS:
        assert name.split()[-1] in shown.stdout


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self):
        self.names = set()

    def Export(self, request, context):
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.names |= {(span.trace_id.hex(), span.name.rpartition("/")[2]) for span in scope.spans}
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_spans_reach_an_otlp_collector(start_router, stack):
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    router = start_router(stack.workers, None, otlp_endpoint=endpoint)
    trace_id, _, _ = await traced(router.address, fresh())
    async with asyncio.timeout(60):
        while not {(trace_id, "ModelInfer"), (trace_id, "onnxruntime run")} <= collector.names:
            await asyncio.sleep(0.05)
    server.stop(0)


async def test_a_collector_that_is_not_there_costs_no_request(start_router, stack):
    router = start_router(stack.workers, None, otlp_endpoint=f"http://{free_address()}")
    for _ in range(20):
        await traced(router.address, fresh())
