"""What the console reads of a scrape is what Prometheus reads of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from services.console.data.exposition_reader import ExpositionReader
from services.runtime.rpc.exposition import expose
from services.runtime.telemetry.metrics import Buckets, Family, Sample

COUNTER = Family("ringmesh_events_total", "counter", "what happened", ("model", "tenant"))
TIMES = Family("ringmesh_redis_duration_seconds", "histogram", "how long")


def simple(samples):
    return sorted((sample.name, sorted(dict(sample.labels).items()), sample.value) for sample in samples)


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8), st.floats(0, 1e18)), max_size=5))
def test_it_reads_as_prometheus_does(series):
    labelled = {(model, tenant): value for model, tenant, value in series}
    samples = [Sample(COUNTER, labels, value) for labels, value in labelled.items()]
    samples.append(Sample(TIMES, (), Buckets((0.1, 1.0), (1, 2, 3), 4.5)))
    text = expose(samples, "")[0].decode()
    theirs = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    reader = ExpositionReader()
    for _ in range(2):  # the second time by what it knows
        assert simple(reader.read(text)) == simple(theirs)


@pytest.mark.parametrize("line", ["ringmesh_x", 'ringmesh_x{a="b"}', "ringmesh_x one", 'ringmesh_x{a="b"} '])
def test_a_line_that_is_no_sample_is_refused(line):
    with pytest.raises(ValueError):  # noqa: PT011
        ExpositionReader().read(line)


def test_what_is_not_ours_is_left_out():
    text = "# HELP go_threads x\ngo_threads 5\nringmesh_x 1 1700000000\n<html>\n"
    assert simple(ExpositionReader().read(text)) == [("ringmesh_x", [], 1.0)]


def test_of_most_histograms_only_sums_and_counts_are_read():
    text = 'ringmesh_s_seconds_bucket{le="1"} 2\nringmesh_s_seconds_count 2\nringmesh_s_seconds_sum 1.5\n'
    assert [name for name, _, _ in simple(ExpositionReader().read(text))] == [
        "ringmesh_s_seconds_count",
        "ringmesh_s_seconds_sum",
    ]


def test_durations_are_added_up_over_where_answers_came_from():
    text = """ringmesh_request_duration_seconds_bucket{model="m",outcome="miss",le="1"} 2
ringmesh_request_duration_seconds_bucket{model="m",outcome="joined",le="1"} 3
"""
    reader = ExpositionReader()
    for _ in range(2):
        assert simple(reader.read(text)) == [
            ("ringmesh_request_duration_seconds_bucket", [("le", "1"), ("model", "m")], 5.0)
        ]
