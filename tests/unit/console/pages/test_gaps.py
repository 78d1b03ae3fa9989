"""What the trace page says about the time that no span covers."""

from services.console.data.trace_store import TraceStore
from services.console.pages import gaps, story, traces_page
from tests.unit.console.data.test_trace_store import span


def trace(*, received=1, computed=26, answered=153, total=154):
    """A request that the worker had from `received` to `computed` ms, in an attempt that took until `answered` ms."""
    store = TraceStore(max_bytes=1 << 20, max_traces=10)
    for service, made in (
        ("ringmesh-router", span(7, 1, end=total, model="mlp", cache="miss", worker="w0")),
        ("ringmesh-router", span(7, 2, parent=1, start=0, end=answered, name="router Execute", worker="w0")),
        ("ringmesh-worker", span(7, 3, parent=2, start=received, end=computed, name="worker Execute")),
    ):
        made.name = made.name.replace("router Execute", "ringmesh/Execute").replace(
            "worker Execute", "ringmesh/Execute"
        )
        store.add(service, made)
    return store.find(f"{7:032x}")


def texts(found):
    return [(gap.duration_ns // 1_000_000, gap.text) for gap in gaps.find(found[1])]


def test_the_wait_for_other_requests_of_an_envelope_is_named():
    found = trace()
    assert texts(found) == [(127, "waiting for other requests in the same envelope")]
    assert "127 ms of 154 ms passed waiting for other requests in the same envelope." in story.tell(*found)


def test_the_wait_for_earlier_envelopes_is_named():
    assert texts(trace(received=100, computed=150)) == [
        (100, "waiting in the router for earlier envelopes of the model")
    ]


def test_equal_waits_before_and_after_the_worker_are_transit():
    transit = "on the way between the router and the worker"
    assert texts(trace(received=20, computed=130, answered=150)) == [
        (4, "in the router after the last step: storing and sending the answer"),
        (20, transit),
        (20, transit),
    ]


def test_short_gaps_are_not_explained():
    assert texts(trace(received=1, computed=153, answered=153)) == []


def test_a_gap_stands_between_the_spans_where_it_happens():
    _, tree = trace(received=70, computed=80, answered=153)
    rows = [(row.depth, row.gap or row.span.short_name) for row in traces_page._waterfall(tree)]
    transit = (2, "on the way between the router and the worker")
    assert rows == [(0, "router ModelInfer"), (1, "Execute"), transit, (2, "Execute"), transit]


def test_spans_that_end_after_their_parents_have_no_negative_gaps():
    _, tree = trace(received=0, computed=200, answered=100)
    assert all(gap.duration_ns > 0 for gap in gaps.find(tree))
