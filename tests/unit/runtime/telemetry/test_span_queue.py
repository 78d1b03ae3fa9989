import asyncio
import json
from types import MappingProxyType

import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from services.runtime.telemetry.span_export import _QUEUE, Collector, SpanFolder, SpanQueue
from services.runtime.telemetry.spans import Event, Kind, Process, SharedAttributes, Span

ROUTER = Process("router", "r1")


def span(name="call", process=ROUTER, attributes=MappingProxyType({"n": 1, "yes": True}), **more):
    return Span(process, "ab" * 16, "cd" * 8, "ef" * 8, name, Kind.SERVER, 10, 20, attributes, **more)


class Destination:
    """Takes what `fates` says, then all."""

    name = "test"

    def __init__(self, *fates):
        self.fates = list(fates)
        self.taken = []
        self.open = asyncio.Event()
        self.open.set()

    def pack(self, span):
        return span.name

    async def send(self, batch):
        await self.open.wait()
        fate = self.fates.pop(0) if self.fates else "sent"
        if fate == "sent":
            self.taken += batch
        return fate

    async def close(self):
        pass


def test_a_span_has_the_attributes_that_it_shares_with_others_and_its_own():
    one = span(attributes={"n": 1}, shared=SharedAttributes({"model": "m", "yes": True}))
    read = trace_pb2.Span.FromString(one.to_otlp()).attributes
    assert [a.key for a in read] == ["model", "yes", "n"]
    assert json.loads(one.to_json())["attributes"] == {"model": "m", "yes": True, "n": 1}


async def test_what_waits_is_sent_at_the_end():
    destination = Destination()
    queue = SpanQueue(destination)
    queue.put([span("a"), span("b")])
    await queue.close()
    assert destination.taken == ["a", "b"]
    assert (queue.sent, queue.dropped) == (2, 0)


async def test_what_was_not_taken_is_sent_again_in_order():
    destination = Destination("again")
    queue = SpanQueue(destination)
    queue.put([span("a"), span("b")])
    async with asyncio.timeout(60):
        while queue.sent < 2:
            await asyncio.sleep(0.01)
    assert destination.taken == ["a", "b"]
    await queue.close()


async def test_a_destination_that_hangs_costs_spans_and_no_memory():
    destination = Destination()
    destination.open.clear()
    queue = SpanQueue(destination)
    put = 0
    while queue.has_room:
        queue.put([span(str(put))])
        put += 1
    assert put == _QUEUE
    await queue.close()
    assert (queue.sent, queue.dropped) == (0, put)


async def test_what_can_never_be_taken_is_counted():
    queue = SpanQueue(Destination("lost"))
    queue.put([span()])
    await queue.close()
    assert (queue.sent, queue.dropped) == (0, 1)


async def test_a_full_disk_loses_the_spans_and_nothing_else(tmp_path):
    folder = SpanFolder(tmp_path / "spans", "router")
    (tmp_path / "spans").rmdir()
    queue = SpanQueue(folder)
    queue.put([span()])
    await queue.close()
    assert queue.dropped == 1


def test_otlp_bytes_are_the_span():
    made = span(
        error="no", trace_state="a=b", events=(Event("e", 15, {"x": 1.5}),), links=(("11" * 16, "22" * 8),)
    ).to_otlp()
    read = trace_pb2.Span.FromString(made)
    assert (read.trace_id, read.span_id, read.parent_span_id) == (b"\xab" * 16, b"\xcd" * 8, b"\xef" * 8)
    assert (read.name, read.kind, read.trace_state) == ("call", trace_pb2.Span.SPAN_KIND_SERVER, "a=b")
    assert (read.start_time_unix_nano, read.end_time_unix_nano) == (10, 20)
    assert {a.key: a.value.WhichOneof("value") for a in read.attributes} == {"n": "int_value", "yes": "bool_value"}
    assert (read.status.code, read.status.message) == (trace_pb2.Status.STATUS_CODE_ERROR, "no")
    assert read.events[0].attributes[0].value.double_value == 1.5
    assert read.links[0].trace_id == b"\x11" * 16


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *((number, "int_value") for number in (0, 1, 127, 128, 1 << 40, (1 << 63) - 1, -1, -(1 << 63))),
        *((number, "double_value") for number in (0.0, 1.0, -2.5e-7)),
        *((truth, "bool_value") for truth in (True, False)),
        *((text, "string_value") for text in ("", "1", "ü" * 200)),
    ],
)
def test_an_attribute_has_the_type_and_value_that_it_was_given(value, kind):
    (read,) = trace_pb2.Span.FromString(span(attributes={"key": value}).to_otlp()).attributes
    assert (read.key, read.value.WhichOneof("value"), getattr(read.value, kind)) == ("key", kind, value)


async def test_a_request_to_the_collector_groups_spans_by_their_process():
    collector = Collector("http://127.0.0.1:1")
    sent = []

    async def export(request, **_):
        sent.append(trace_service_pb2.ExportTraceServiceRequest.FromString(request))

    collector._export = export
    other = span("theirs", Process("worker", "w1"))
    assert await collector.send([collector.pack(s) for s in (span("a"), other, span("b"))]) == "sent"
    found = {
        {a.key: a.value.string_value for a in group.resource.attributes}["service.name"]: [
            s.name for scope in group.scope_spans for s in scope.spans
        ]
        for group in sent[0].resource_spans
    }
    assert found == {"ringmesh-router": ["a", "b"], "ringmesh-worker": ["theirs"]}
    await collector.close()
