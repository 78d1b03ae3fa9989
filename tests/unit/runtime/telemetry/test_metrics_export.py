import asyncio

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2

from services.runtime.telemetry.metrics import Buckets, Exemplar, Family, Metrics, Sample
from services.runtime.telemetry.metrics_export import export, to_otlp
from services.runtime.telemetry.spans import Process

COUNT = Family("c_total", "counter", "counts", ("kind",))
TIMES = Family("t_seconds", "histogram", "times")
LEVEL = Family("l", "gauge", "a level")
SAMPLES = [
    Sample(COUNT, ("a",), 3),
    Sample(COUNT, ("b",), 4),
    Sample(LEVEL, (), 0.5),
    Sample(TIMES, (), Buckets((1.0, 2.0), (1, 0, 2), 7.5, (Exemplar("ab" * 16, 0.5, 10.0), None, None))),
]


def read(request):
    message = metrics_service_pb2.ExportMetricsServiceRequest.FromString(request)
    return {metric.name: metric for metric in message.resource_metrics[0].scope_metrics[0].metrics}


def test_samples_are_otlp_metrics():
    found = read(to_otlp(SAMPLES, Process("router", "r1"), 1, 2))
    assert {p.attributes[0].value.string_value: p.as_double for p in found["c_total"].sum.data_points} == {
        "a": 3,
        "b": 4,
    }
    assert found["c_total"].sum.is_monotonic
    assert found["l"].gauge.data_points[0].as_double == 0.5
    (point,) = found["t_seconds"].histogram.data_points
    assert (point.count, point.sum) == (3, 7.5)
    assert (list(point.bucket_counts), list(point.explicit_bounds)) == ([1, 0, 2], [1.0, 2.0])
    assert point.exemplars[0].trace_id == b"\xab" * 16


async def collector(answer):
    received = []

    async def export(request, context):
        received.append(request)
        return await answer(context)

    server = grpc.aio.server()
    handlers = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    name = "opentelemetry.proto.collector.metrics.v1.MetricsService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"http://127.0.0.1:{port}", received


def exporting(endpoint):
    metrics = Metrics()
    metrics.add(lambda: SAMPLES)
    return asyncio.create_task(export(endpoint, Process("router", "r1"), metrics, period=0.02))


async def test_a_collector_that_comes_and_goes_gets_the_totals():
    async def fail_once(context):
        if len(received) == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return b""

    server, endpoint, received = await collector(fail_once)
    sending = exporting(endpoint)
    async with asyncio.timeout(60):
        while len(received) < 3:
            await asyncio.sleep(0.01)
    sending.cancel()
    await asyncio.wait([sending])
    await server.stop(0)
    assert "c_total" in read(received[-1])


async def test_a_collector_of_traces_alone_is_left_alone():
    async def refuse(context):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "only traces")

    server, endpoint, received = await collector(refuse)
    async with asyncio.timeout(60):
        await exporting(endpoint)
    assert received  # more than once where an answer came later than the period
    await server.stop(0)
