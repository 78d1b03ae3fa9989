"""OTLP/gRPC export of metrics: samples as at a scrape, sent to a collector every PERIOD_SECONDS."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.metrics.v1 import metrics_pb2

from services.runtime.telemetry.metrics import Buckets, Family, Metrics, Sample
from services.runtime.telemetry.otlp import open_channel
from services.runtime.telemetry.spans import Process, resource

log = logging.getLogger(__name__)

PERIOD_SECONDS = 15.0
_EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
_CUMULATIVE = metrics_pb2.AGGREGATION_TEMPORALITY_CUMULATIVE


async def export(endpoint: str, process: Process, metrics: Metrics, period: float = PERIOD_SECONDS) -> None:
    """Sends the samples until cancelled. A failed export loses nothing: counts are cumulative, so the next has them."""
    started_ns = time.time_ns()
    async with open_channel(endpoint) as channel:
        send: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_EXPORT)
        while True:
            samples = await metrics.collect()
            request = await asyncio.to_thread(to_otlp, samples, process, started_ns, time.time_ns())
            try:
                await send(request, timeout=period)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    log.info("the OTLP endpoint takes no metrics; they are at /metrics")
                    return
                log.debug("metrics were not taken: %s", error.details())
            await asyncio.sleep(period)


def to_otlp(samples: Iterable[Sample], process: Process, started_ns: int, now_ns: int) -> bytes:
    request = metrics_service_pb2.ExportMetricsServiceRequest()
    group = request.resource_metrics.add()
    group.resource.MergeFromString(resource(process))
    scope = group.scope_metrics.add()
    scope.scope.name = "ringmesh"
    found: dict[Family, metrics_pb2.Metric] = {}
    for family, labels, value in samples:
        metric = found.get(family)
        if metric is None:
            metric = found[family] = scope.metrics.add(name=family.name, description=family.meaning)
            if family.kind == "counter":
                metric.sum.aggregation_temporality = _CUMULATIVE
                metric.sum.is_monotonic = True
            elif family.kind == "histogram":
                metric.histogram.aggregation_temporality = _CUMULATIVE
        if isinstance(value, Buckets):
            point = metric.histogram.data_points.add(
                start_time_unix_nano=started_ns,
                time_unix_nano=now_ns,
                count=sum(value.counts),
                sum=value.sum,
                bucket_counts=value.counts,
                explicit_bounds=value.bounds,
            )
            for exemplar in value.exemplars:
                if exemplar is not None:
                    point.exemplars.add(
                        time_unix_nano=int(exemplar.at * 1e9),
                        as_double=exemplar.value,
                        trace_id=bytes.fromhex(exemplar.trace_id),
                    )
            attributes = point.attributes
        else:
            points = metric.sum.data_points if family.kind == "counter" else metric.gauge.data_points
            number = points.add(start_time_unix_nano=started_ns, time_unix_nano=now_ns, as_double=value)
            attributes = number.attributes
        for key, label in zip(family.labels, labels, strict=True):
            attributes.add(key=key).value.string_value = label
    return request.SerializeToString()
