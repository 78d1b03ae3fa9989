"""What the console keeps of the spans it is sent."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status

from services.console.data import span_names
from services.console.data.otlp import TraceReceiver
from services.console.data.trace_store import LONGEST_TEXT, MAX_SHARE, MAX_SPANS, TraceQuery, TraceStore

MS = 1_000_000
NAMES = {
    "model": span_names.MODEL,
    "cache": span_names.OUTCOME,
    "tenant": span_names.TENANT,
    "worker": span_names.WORKER,
    "key": span_names.KEY,
}


def span(trace, number=1, *, parent=0, start=0, end=1, error="", name="router ModelInfer", **attributes):
    return Span(
        trace_id=trace.to_bytes(16, "big"),
        span_id=number.to_bytes(8, "big"),
        parent_span_id=parent.to_bytes(8, "big") if parent else b"",
        name=name,
        kind=Span.SPAN_KIND_SERVER if name == "router ModelInfer" else Span.SPAN_KIND_INTERNAL,
        start_time_unix_nano=(1000 + start) * MS,
        end_time_unix_nano=(1000 + end) * MS,
        status=Status(code=2, message=error) if error else Status(),
        attributes=[KeyValue(key=NAMES[key], value=AnyValue(string_value=value)) for key, value in attributes.items()],
    )


def store(max_bytes=1 << 20, max_traces=100):
    return TraceStore(max_bytes=max_bytes, max_traces=max_traces)


def found(store, **query):
    matching = [summary for summary in store.summaries() if TraceQuery(**query).matches(summary)]
    return [int(one.trace_id, 16) for one in sorted(matching, key=lambda one: one.start_ns, reverse=True)]


def test_spans_of_one_trace_become_one_tree():
    kept = store()
    kept.add("ringmesh-worker", span(7, 2, parent=1, start=2, end=3, name="worker Execute"))
    kept.add("ringmesh-router", span(7, 1, start=0, end=5, model="mlp"))
    summary, tree = kept.find(f"{7:032x}")
    assert [(depth, one.name) for depth, one in tree.rows] == [(0, "router ModelInfer"), (1, "worker Execute")]
    assert (summary.name, summary.model, summary.duration_ns) == ("router ModelInfer", "mlp", 5 * MS)


def test_a_span_that_is_sent_twice_is_kept_once():
    kept = store()
    for _ in range(2):
        kept.add("ringmesh-router", span(7))
    summary, tree = kept.find(f"{7:032x}")
    assert (summary.spans, len(tree.rows)) == (1, 1)


@pytest.mark.parametrize("ids", [{"trace_id": b"x"}, {"span_id": b""}, {"trace_id": bytes(16)}])
def test_ids_that_are_none_are_refused(ids):
    broken = span(7)
    for name, value in ids.items():
        setattr(broken, name, value)
    with pytest.raises(ValueError, match="trace id of 16 bytes"):
        store().add("ringmesh-router", broken)


def test_spans_that_are_each_others_parents_are_all_shown():
    kept = store()
    kept.add("anybody", span(7, 1, parent=2))
    kept.add("anybody", span(7, 2, parent=1))
    _, tree = kept.find(f"{7:032x}")
    assert len(tree.rows) == 2


def test_a_search_finds_by_what_the_router_said():
    kept = store()
    kept.add("ringmesh-router", span(1, model="mlp", cache="miss", tenant="a", worker="worker-0", end=40))
    kept.add("ringmesh-router", span(2, model="mlp", cache="hit-local", tenant="b", start=1, end=2))
    kept.add("ringmesh-router", span(3, model="other", start=2, end=3, error="no input 'z'"))
    assert found(kept) == [3, 2, 1]
    assert found(kept, model="mlp") == [2, 1]
    assert found(kept, tenant="a") == found(kept, cache="miss") == found(kept, worker="worker-0") == [1]
    assert found(kept, status="error") == found(kept, text="INPUT 'Z'") == [3]
    assert found(kept, status="ok") == [2, 1]
    assert found(kept, min_ms=30) == [1]
    assert found(kept, max_ms=1) == [3, 2]
    assert found(kept, text=f"{2:032x}") == [2]


def test_the_oldest_goes_first_but_failures_stay():
    kept = store(max_traces=10)
    kept.add("ringmesh-router", span(1, error="broken"))
    for trace in range(2, 40):
        kept.add("ringmesh-router", span(trace, start=trace))
    assert len(kept) == 10
    assert found(kept, status="error") == [1]
    assert found(kept, status="ok") == list(range(39, 30, -1))


def test_failures_do_not_crowd_out_all_else():
    kept = store(max_traces=10)
    for trace in range(1, 101):
        kept.add("ringmesh-router", span(trace, start=trace, error="broken" if trace % 2 else ""))
    assert len(found(kept, status="ok")) == 5


def test_one_endless_trace_is_cut():
    kept = store(max_bytes=64 << 20)
    for number in range(1, MAX_SPANS + 11):
        kept.add("anybody", span(7, number))
    assert (kept.find(f"{7:032x}")[0].spans, kept.dropped_spans) == (MAX_SPANS, 10)


def test_one_large_trace_is_cut_and_leaves_room_for_others():
    kept = store(max_bytes=1 << 20)
    kept.add("ringmesh-router", span(1))
    taken = [kept.add("anybody", span(7, number, model="m" * 10_000)) for number in range(1, 401)]
    assert kept.bytes < (1 << 20) * MAX_SHARE + 10_000
    assert kept.dropped_spans == taken.count(False) > 390
    assert kept.find(f"{1:032x}") is not None
    assert kept.find(f"{7:032x}")[0].spans == taken.count(True)


def test_a_span_that_is_too_large_leaves_nothing_behind():
    kept = store(max_bytes=1 << 20)
    assert not kept.add("anybody", span(7, name="x" * (1 << 20)))
    assert (len(kept), kept.bytes, kept.find(f"{7:032x}")) == (0, 0, None)


def test_a_long_text_is_cut_in_what_a_search_sees():
    kept = store()
    kept.add("s" * 10_000, span(7, model="m" * 10_000, error="e" * 10_000))
    summary, tree = kept.find(f"{7:032x}")
    assert (len(summary.model), len(summary.error)) == (LONGEST_TEXT, LONGEST_TEXT)
    assert len(tree.rows[0][1].service) == LONGEST_TEXT


async def test_an_exporter_is_told_what_was_dropped():
    kept = store(max_bytes=1 << 20)
    scope = ScopeSpans(spans=[span(7, number, model="m" * 10_000) for number in range(1, 301)])
    request = ExportTraceServiceRequest(resource_spans=[ResourceSpans(scope_spans=[scope])])
    handler = TraceReceiver(kept).service().handlers["Export"]
    answer = ExportTraceServiceResponse.FromString(await handler.unary_unary(request.SerializeToString(), None))
    assert answer.partial_success.rejected_spans == kept.dropped_spans > 290
    assert "is full" in answer.partial_success.error_message


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30), st.booleans(), st.integers(0, 2000)), max_size=200))
def test_bounds_hold_whatever_comes(spans):
    kept = store(max_bytes=20_000, max_traces=12)
    for trace, number, fails, size in spans:
        kept.add("ringmesh-router", span(trace, number, error="x" * size if fails else "", model="m" * size))
        assert len(kept) <= 12
        assert kept.bytes <= 20_000
    assert kept.bytes >= 0


def test_its_bytes_are_near_what_python_takes():
    spans = [span(trace, number, model="mlp", cache="miss") for trace in range(1, 400) for number in range(1, 8)]
    tracemalloc.start()
    try:
        kept = store(max_bytes=64 << 20, max_traces=10_000)
        for one in spans:
            kept.add("ringmesh-router", one)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.6 * taken < kept.bytes < 1.6 * taken
