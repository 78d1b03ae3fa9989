"""What the runtime's exporter writes is what `ringmesh trace` shows."""

import asyncio
import os
import time

import pytest
from rich.console import Console

from services.cli.commands import traces
from services.cli.errors import CommandError
from services.runtime.telemetry.span_export import SpanFolder, SpanQueue
from services.runtime.telemetry.spans import Process
from services.runtime.telemetry.tracing import Tracer

MS = 1_000_000
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = f"00-{TRACE}-b7ad6b7169203331-01"


def shown(table):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def write(folder, service, traceparent, start, end, children=(), error=""):
    """Returns the traceparent that the last child sends on."""
    trace = Tracer(Process(service, "0"), 1.0, []).start(traceparent)
    onward = "00" + "f" * 14
    for name, child_start, child_end in children:
        trace.span(name, child_start * MS, child_end * MS, {"ringmesh.rank": 0, "ringmesh.empty": ""}, onward)

    async def finish():
        tracer = Tracer(Process(service, "0"), 1.0, [SpanQueue(SpanFolder(folder, service))])
        tracer.finish(trace, f"{service} call", start * MS, end * MS, {"ringmesh.model": "mlp"}, error)
        await tracer.close()

    asyncio.run(finish())
    return trace.trace_id, trace.traceparent(onward)


@pytest.fixture
def folder(tmp_path):
    _, onward = write(tmp_path, "router", CALLER, 1000, 1010, [("forward", 1002, 1009)])
    write(tmp_path, "worker", onward, 1003, 1008)
    return tmp_path


def test_a_trace_is_a_tree_over_processes(folder):
    trace = traces.find(folder, TRACE)
    assert [(depth, span.name) for depth, span in trace.rows] == [
        (0, "router call"),
        (1, "forward"),
        (2, "worker call"),
    ]
    assert trace.duration_ns == 10 * MS


def test_spans_that_are_not_written_yet_are_awaited(tmp_path):
    now = time.time_ns() // MS
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 1:
            write(tmp_path, "router", CALLER, now, now + 9)
        if len(waits) == 2:
            write(tmp_path, "worker", CALLER, now + 2, now + 8)

    trace = traces.find(tmp_path, TRACE, sleep)
    assert {span.name for _, span in trace.rows} == {"router call", "worker call"}
    assert sum(waits) <= 2


def test_the_spans_of_an_older_trace_are_not_awaited(folder):
    assert len(traces.find(folder, TRACE, sleep=pytest.fail).rows) == 3


def test_a_row_says_where_when_how_long_and_what(folder):
    title, _, router, forward, worker = shown(traces.tree(traces.find(folder, TRACE)))
    assert TRACE in title
    assert router.split()[:5] == ["router", "call", "router", "0.00", "10.00"]
    assert forward.split()[:5] == ["└─", "forward", "router", "2.00", "7.00"]
    assert worker.split()[:6] == ["└─", "worker", "call", "worker", "3.00", "5.00"]
    assert router.endswith("model=mlp")
    assert forward.endswith("rank=0")
    assert router.index("█") < forward.index("█") < worker.index("█")


def test_a_unique_prefix_is_enough(folder):
    assert traces.find(folder, TRACE[:6].upper()).trace_id == TRACE


def test_an_ambiguous_prefix_names_the_candidates(folder):
    other = TRACE[:-1] + "d"
    write(folder, "router", f"00-{other}-b7ad6b7169203331-01", 1, 2)
    with pytest.raises(CommandError, match=f"2 traces begin with 0af7: {TRACE}, {other}"):
        traces.find(folder, "0af7")


def test_what_is_not_there_is_told_as_such(folder, tmp_path):
    with pytest.raises(CommandError, match="no trace ffff"):
        traces.find(folder, "ffff", sleep=lambda _: None)
    with pytest.raises(CommandError, match="no trace ffff"):
        traces.find(tmp_path / "nowhere", "ffff", sleep=lambda _: None)


def test_a_torn_or_foreign_line_is_passed_over(folder):
    with (folder / "router-1.jsonl").open("w") as file:
        file.write(f'{{"unknown":1,"trace_id":"{TRACE}"}}\n{{"trace_id":"{TRACE}","span_id":"12')
    assert len(traces.find(folder, TRACE).rows) == 3


def test_an_error_stands_before_the_attributes(folder):
    trace_id, _ = write(folder, "router", None, 5, 6, error="no model [b]x[/b]")
    assert shown(traces.tree(traces.find(folder, trace_id)))[-1].endswith("no model [b]x[/b] model=mlp")


def test_the_latest_traces_come_first_and_20_at_most(folder):
    ids = [write(folder, "router", None, 2000 + number, 2001 + number)[0] for number in range(20)]
    assert [trace.trace_id for trace in traces.latest(folder)] == ids[::-1]
    assert ids[-1] in shown(traces.listing(traces.latest(folder)))[1]


def test_the_oldest_files_are_forgotten(tmp_path):
    for number in range(70):
        path = tmp_path / f"router-{number}.jsonl"
        path.touch()
        os.utime(path, (number, number))
    traces.prune(tmp_path)
    assert sorted(int(path.stem.split("-")[1]) for path in tmp_path.iterdir()) == list(range(6, 70))


def test_a_model_may_be_sampled_by_a_ratio_of_its_own():
    tracer = Tracer(Process("router", "0"), 0.0, [])
    tracer.ratios["all"] = 1.0
    one, caller = tracer.start(None), tracer.start(CALLER[:-2] + "00")
    for trace in (one, caller):
        tracer.sample(trace, "other")
        assert not trace.sampled
        tracer.sample(trace, "all")
    assert (one.sampled, caller.sampled) == (True, False)
    tracer.ratios["all"] = 0.0
    tracer.sample(one, "all")
    assert not one.sampled
