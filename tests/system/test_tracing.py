"""One trace from the caller's span to the ONNX Runtime run, whatever is or is not there to collect it."""

import asyncio
import json
import subprocess
import sys
from concurrent import futures

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from services.runtime.tracing import new_span_id
from tests.system.processes import free_address
from tests.system.test_cache import fresh

INFER = "/inference.GRPCInferenceService/ModelInfer"


async def traced(address, request, *, sampled=True):
    """(trace id, the caller's span id, trailing metadata)"""
    trace_id, span_id = new_span_id() * 2, new_span_id()
    async with grpc.aio.insecure_channel(address) as channel:
        context = (("traceparent", f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}"),)
        call = channel.unary_unary(INFER)(request.SerializeToString(), metadata=context, timeout=30)
        await call
        return trace_id, span_id, dict(await call.trailing_metadata())


def spans(folder, trace_id):
    found = []
    for file in folder.glob("*.jsonl"):
        found += [json.loads(line) for line in file.read_text().splitlines() if trace_id in line]
    return found


async def complete(folder, trace_id, names):
    async with asyncio.timeout(20):
        while not names <= {span["name"] for span in spans(folder, trace_id)}:
            await asyncio.sleep(0.05)
    return {span["name"]: span for span in spans(folder, trace_id)}


MISS = {
    "router ModelInfer",
    "cache.local",
    "cache.shared",
    "forward",
    "worker Execute",
    "queue",
    "batch",
    "onnxruntime run",
}


async def test_a_trace_of_a_miss_shows_every_hop_under_the_callers_span(stack):
    trace_id, caller, told = await traced(stack.router, fresh())
    assert told["ringmesh-trace-id"] == trace_id
    found = await complete(stack.trace_dir, trace_id, MISS)
    parents = {name: span["parent_id"] for name, span in found.items()}
    assert parents["router ModelInfer"] == caller
    router = found["router ModelInfer"]["span_id"]
    assert {parents[name] for name in ("cache.local", "cache.shared", "forward")} == {router}
    assert parents["worker Execute"] == found["forward"]["span_id"]
    worker = found["worker Execute"]["span_id"]
    assert {parents[name] for name in ("queue", "batch", "onnxruntime run")} == {worker}
    assert found["onnxruntime run"]["attributes"]["ringmesh.provider"] == "CPUExecutionProvider"
    for inner, outer in (("onnxruntime run", "worker Execute"), ("forward", "router ModelInfer")):
        assert found[outer]["start_ns"] <= found[inner]["start_ns"] <= found[inner]["end_ns"] <= found[outer]["end_ns"]


async def test_a_trace_of_a_hit_ends_at_the_cache(stack):
    request = fresh()
    await traced(stack.router, request)
    trace_id, _, _ = await traced(stack.router, request)
    found = await complete(stack.trace_dir, trace_id, {"router ModelInfer", "cache.local"})
    assert set(found) == {"router ModelInfer", "cache.local"}
    assert found["router ModelInfer"]["attributes"]["ringmesh.cache"] == "hit-local"


async def test_a_caller_that_does_not_sample_is_respected(stack):
    trace_id, _, told = await traced(stack.router, fresh(), sampled=False)
    assert told["ringmesh-trace-id"] == trace_id
    marker, _, _ = await traced(stack.router, fresh())
    await complete(stack.trace_dir, marker, MISS)  # sent later, so the other would be there by now
    assert spans(stack.trace_dir, trace_id) == []


async def test_a_failure_is_marked_in_its_trace(stack):
    request = fresh()
    request.inputs[0].name = "z"
    trace_id, span_id = new_span_id() * 2, new_span_id()
    async with grpc.aio.insecure_channel(stack.router) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary(INFER)(
                request.SerializeToString(), metadata=(("traceparent", f"00-{trace_id}-{span_id}-01"),)
            )
    found = await complete(stack.trace_dir, trace_id, {"router ModelInfer", "worker Execute"})
    assert "'z'" in found["router ModelInfer"]["error"]
    assert "'z'" in found["worker Execute"]["error"]


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
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    for name in MISS:
        assert name in shown.stdout


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self):
        self.names = set()

    def Export(self, request, context):
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.names |= {(span.trace_id.hex(), span.name) for span in scope.spans}
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_spans_reach_an_otlp_collector(start_router, start_worker):
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    worker = start_worker("worker-otlp", otlp_endpoint=endpoint)
    router = start_router([worker.address], None, otlp_endpoint=endpoint)
    trace_id, _, _ = await traced(router.address, fresh())
    async with asyncio.timeout(20):
        while not {(trace_id, "router ModelInfer"), (trace_id, "onnxruntime run")} <= collector.names:
            await asyncio.sleep(0.05)
    server.stop(0)


async def test_a_collector_that_is_not_there_costs_no_request(start_router, start_worker):
    nowhere = f"http://{free_address()}"
    worker = start_worker("worker-otlp", otlp_endpoint=nowhere)
    router = start_router([worker.address], None, otlp_endpoint=nowhere)
    for _ in range(20):
        await traced(router.address, fresh())
