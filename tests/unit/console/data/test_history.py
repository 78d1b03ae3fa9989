"""What the console's history of metrics answers, by a clock of its own."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.console.data.history import KEPT_SECONDS, MAX_SCRAPES, MAX_SERIES, History, ScrapedSample
from tests.unit.clock import Clock


def sample(name, labels, value):
    return ScrapedSample(name, frozenset(labels.items()), value)


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def history(clock):
    return History(clock)


def scrape(history, clock, *values, target="router", name="requests_total"):
    """One scrape each 2 s; None: the series is not there."""
    for value in values:
        history.add(target, [] if value is None else [sample(name, {"model": "mlp"}, value)])
        clock.now += 2


def test_a_counter_that_grows_has_a_rate(history, clock):
    scrape(history, clock, 10, 30, 50)
    assert history.increase("requests_total", 60) == {(): 40.0}
    assert history.rate("requests_total", 60)[()] == pytest.approx(40 / 6)


def test_what_was_counted_before_the_first_scrape_is_not_of_now(history, clock):
    scrape(history, clock, 1_000_000)
    assert history.increase("requests_total", 60) == {(): 0.0}


def test_a_restarted_process_counts_from_zero(history, clock):
    scrape(history, clock, 100, 110, 4)
    assert history.increase("requests_total", 60) == {(): 14.0}


def test_the_first_failure_ever_counts(history, clock):
    scrape(history, clock, None, None, 1)
    assert history.increase("requests_total", 60) == {(): 1.0}


def test_a_gap_is_bridged(history, clock):
    scrape(history, clock, 5, None, None, 9)
    assert history.increase("requests_total", 60) == {(): 4.0}


def test_only_the_window_counts(history, clock):
    scrape(history, clock, 0, 100, 101, 103)
    assert history.increase("requests_total", 5) == {(): 3.0}


def test_labels_select_and_group(history, clock):
    def both(a, b):
        return [
            sample("n", {"code": "OK", "model": "a"}, a),
            sample("n", {"code": "BAD", "model": "a"}, b),
        ]

    for target in ("one", "two"):
        history.add(target, both(0, 0))
        history.add(target, both(3, 1))
    assert history.increase("n", 60, ("code",)) == {("OK",): 6.0, ("BAD",): 2.0}
    assert history.increase("n", 60, ("target",), code="OK") == {("one",): 3.0, ("two",): 3.0}
    assert history.last("n", code="BAD") == {(): 2.0}


def test_a_series_that_is_gone_has_no_last_value(history, clock):
    scrape(history, clock, 5, None)
    assert history.last("requests_total") == {}


def test_quantiles_are_those_of_prometheus(history, clock):
    def buckets(*counts):
        bounds = ("0.1", "0.2", "0.4", "+Inf")
        return [sample("t_bucket", {"le": le}, count) for le, count in zip(bounds, counts, strict=True)]

    history.add("router", buckets(0, 0, 0, 0))
    history.add("router", buckets(10, 20, 40, 40))
    assert history.quantile(0.5, "t", 60)[()] == pytest.approx(0.2)
    assert history.quantile(0.75, "t", 60)[()] == pytest.approx(0.3)
    history.add("router", buckets(10, 20, 40, 400))
    assert history.quantile(0.99, "t", 60)[()] == pytest.approx(0.4)


def test_a_quantile_of_nothing_is_not_there(history, clock):
    history.add("router", [sample("t_bucket", {"le": "+Inf"}, 0)])
    assert history.quantile(0.5, "t", 60) == {}


def test_a_curve_has_gaps_where_nobody_looked(history, clock):
    scrape(history, clock, 0, 10)
    clock.now += 56
    scrape(history, clock, 20)
    curve = history.rates("requests_total", history.edges(60, 10))[()]
    assert len(curve) == 6
    assert sum(math.isnan(value) for value in curve) == 4
    assert sum(value for value in curve if not math.isnan(value)) * 10 == pytest.approx(20)


def test_memory_is_bounded_in_time_and_in_series(history, clock):
    scrape(history, clock, *range(3 * MAX_SCRAPES))
    target = history._targets["router"]
    assert target.count <= MAX_SCRAPES
    assert target.tables["requests_total"].values.shape[0] == MAX_SCRAPES
    assert history.watched(10_000) < KEPT_SECONDS + 2 * MAX_SCRAPES
    history.add("many", [sample("n", {"i": str(i)}, 1) for i in range(MAX_SERIES + 7)])
    assert history.refused() == 7


def test_what_is_older_than_two_minutes_is_coarser_and_loses_no_count(history, clock):
    scrape(history, clock, *range(0, 3 * MAX_SCRAPES * 5, 5))
    assert history.increase("requests_total", 20) == {(): 45.0}
    assert history.increase("requests_total", 1500)[()] == pytest.approx(3750, abs=25)
    curve = history.rates("requests_total", history.edges(900, 10))[()]
    assert curve == pytest.approx([2.5] * 90, rel=0.21)  # 4 to 6 scrapes in a step
    assert sum(curve) * 10 == pytest.approx(2250, abs=25)


def test_a_day_is_kept_in_bounded_memory_and_loses_no_count(history, clock):
    for number in range(90_000 // 10):
        history.add("router", [sample("requests_total", {"model": "mlp"}, 5 * number)])
        clock.now += 10
    target = history._targets["router"]
    assert target.count <= MAX_SCRAPES
    assert target.tables["requests_total"].values.nbytes <= MAX_SCRAPES * 4 * 8
    curve = history.rates("requests_total", history.edges(86_400, 600))[()]
    assert curve == pytest.approx([0.5] * 144)
    assert history.rates("requests_total", history.edges(7200, 60))[()] == pytest.approx([0.5] * 120)


def test_curves_are_broken_down_by_label_and_have_gaps_for_processes_that_were_not_scraped(history, clock):
    for number in range(30):
        history.add("w0", [sample("runs_total", {}, 2 * number)])
        if number < 15:
            history.add("w1", [sample("runs_total", {}, 4 * number)])
        clock.now += 2
    curves = history.rates("runs_total", history.edges(60, 10), ("target",))
    assert curves["w0",][1:5] == pytest.approx([1.0] * 4)
    assert curves["w1",][1:3] == pytest.approx([2.0, 1.6])
    assert all(map(math.isnan, curves["w1",][3:]))
    assert history.rates("runs_total", history.edges(60, 10))[()][4] == pytest.approx(1.0)


def test_series_that_are_long_gone_make_room(history, clock):
    history.add("router", [sample("n", {"i": str(i)}, 1) for i in range(MAX_SERIES)])
    scrape(history, clock, *[None] * int(KEPT_SECONDS))
    scrape(history, clock, 1)
    assert history.refused() == 0
    assert not history.knows("n")


VALUES = st.lists(st.one_of(st.none(), st.integers(0, 50)), min_size=1, max_size=40)


@given(VALUES, VALUES, st.integers(1, 100))
def test_what_a_counter_grew_by_is_the_same_as_counted_one_by_one(one, two, seconds):
    """Two series that come, go, and begin anew at any time, over windows that begin anywhere."""
    clock = Clock()
    history = History(clock)
    grown = {}
    last = {}
    length = max(len(one), len(two))
    for at in range(length):
        now = {name: values[at] for name, values in (("one", one), ("two", two)) if at < len(values)}
        now = {name: value for name, value in now.items() if value is not None}
        history.add("t", [sample("n", {"who": name}, value) for name, value in now.items()])
        for name, value in now.items():
            before = last.get(name, 0 if at else value)  # what was there at first is not of now
            grown.setdefault(name, []).append((clock.now, value - before if value >= before else value))
            last[name] = value
        clock.now += 2
    since = clock.now - seconds
    expected = {(name,): float(sum(by for at, by in steps if at > since)) for name, steps in grown.items()}
    found = history.increase("n", seconds, ("who",))
    if clock.now - 2 > since:
        assert found == expected
    else:
        assert found == {}
