"""Replaying requests against servers."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ledger.reports.replay import ReplayedRequest, RunTime, fitted, needed, percentile_99, replay

ONE_BY_ONE = {"m": RunTime(0, 1)}
BATCHED = {"m": RunTime(100, 10, most=4)}
requests = st.lists(
    st.builds(ReplayedRequest, st.integers(0, 10_000), st.just("m"), st.integers(1, 500)), min_size=1, max_size=80
).map(sorted)


def waits(work, servers):
    return [
        latency - one.weight for one, latency in zip(work, replay(work, servers, ONE_BY_ONE).latencies_us, strict=True)
    ]


def work(*times):
    return [ReplayedRequest(arrived, "m", service) for arrived, service in times]


def test_one_server_takes_one_after_the_other():
    assert waits(work((0, 10), (1, 10), (50, 10)), 1) == [0, 9, 0]


def test_the_first_server_that_is_free_takes_the_next():
    assert waits(work((0, 100), (0, 10), (5, 10), (6, 10)), 2) == [0, 0, 5, 14]


def test_what_waits_runs_together_up_to_the_most_that_a_model_takes():
    arrivals = [ReplayedRequest(at, "m") for at in (0, 1, 2, 3, 4, 5)]
    found = replay(arrivals, 1, BATCHED)
    # One, then four of those that came meanwhile, then the last.
    assert found.latencies_us == [110, 249, 248, 247, 246, 355]
    assert found.busy_us == 110 + 140 + 110
    assert replay(arrivals, 1, {"m": replace(BATCHED["m"], most=8)}).busy_us == 110 + 150


def test_models_do_not_run_together_and_who_waits_longest_is_next():
    arrivals = [ReplayedRequest(0, "a"), ReplayedRequest(1, "b"), ReplayedRequest(2, "a"), ReplayedRequest(3, "b")]
    found = replay(arrivals, 1, {"a": RunTime(10, 1, 4), "b": RunTime(20, 1, 4)})
    assert found.latencies_us == [11, 32, 42, 30]


@given(requests)
def test_more_servers_make_nobody_wait_longer(work):
    before = waits(work, 1)
    for servers in (2, 3, 5):
        after = waits(work, servers)
        assert all(late <= early for late, early in zip(after, before, strict=True))
        before = after
    assert waits(work, len(work)) == [0] * len(work)


@given(requests, st.integers(500, 1500), st.integers(1, 3))
def test_what_is_advised_meets_the_objective_and_one_less_does_not(work, latency_us, slots):
    workers, latency = needed(work, latency_us, slots, 10_000, ONE_BY_ONE)
    assert latency == percentile_99(replay(work, workers * slots, ONE_BY_ONE).latencies_us) <= latency_us
    lowest = max(1, int(sum(one.weight for one in work) / (10_000 * slots)))
    fewer = replay(work, max(workers - 1, 1) * slots, ONE_BY_ONE)
    assert workers == lowest or percentile_99(fewer.latencies_us) > latency_us


def test_where_runs_alone_take_longer_nobody_waits_longer_than_the_objective():
    assert needed(work((0, 1000), (0, 1000)), 500, 1, 10_000, ONE_BY_ONE) == (2, 1000)


def test_waits_are_those_of_queueing_theory():
    chance = random.Random(1)
    at, work = 0.0, []
    for _ in range(200_000):
        at += chance.expovariate(0.7)
        work.append(ReplayedRequest(round(at * 1000), "m", round(chance.expovariate(1.0) * 1000)))
    found = waits(work, 1)
    # M/M/1 at 70 %: the mean of waiting is 0.7 / 0.3 service times.
    assert abs(sum(found) / len(found) / 1000 - 0.7 / 0.3) < 0.15


def test_no_requests_need_no_worker():
    assert needed([], 50_000, 1, 1000, {}) == (0, 0)


def test_run_times_are_fitted_to_shares_of_runs():
    time = fitted([(size, round(4000 / size + 300)) for size in (1, 2, 4, 8) for _ in range(size)])
    assert (time.fixed, time.each, time.most) == (pytest.approx(4000, rel=0.01), pytest.approx(300, rel=0.01), 8)


@pytest.mark.parametrize("runs", [[(1, 500), (1, 700)], [(4, 500), (4, 700)], [(1, 400), (2, 600), (4, 800)]])
def test_what_no_batch_says_is_the_same_for_each(runs):
    time = fitted(runs)
    assert (time.fixed, time.each) == (0, 600)
