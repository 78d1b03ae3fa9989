"""Replaying requests against servers."""

import random

from hypothesis import given
from hypothesis import strategies as st

from services.ledger.reports.replay import Work, needed, percentile_99, waits

requests = st.lists(st.builds(Work, st.integers(0, 10_000), st.integers(1, 500)), min_size=1, max_size=80).map(sorted)


def test_one_server_takes_one_after_the_other():
    assert waits([Work(0, 10), Work(1, 10), Work(50, 10)], 1) == [0, 9, 0]


def test_the_first_server_that_is_free_takes_the_next():
    assert waits([Work(0, 100), Work(0, 10), Work(5, 10), Work(6, 10)], 2) == [0, 0, 5, 14]


@given(requests)
def test_more_servers_make_nobody_wait_longer(work):
    before = waits(work, 1)
    for servers in (2, 3, 5):
        after = waits(work, servers)
        assert all(late <= early for late, early in zip(after, before, strict=True))
        before = after
    assert waits(work, len(work)) == [0] * len(work)


@given(requests, st.integers(0, 1000), st.integers(1, 3))
def test_what_is_advised_meets_the_objective_and_one_less_does_not(work, wait_us, slots):
    workers, wait = needed(work, wait_us, slots, 10_000)
    assert wait == percentile_99(waits(work, workers * slots)) <= wait_us
    lowest = max(1, sum(service for _, service in work) // (10_000 * slots))
    assert workers == lowest or percentile_99(waits(work, (workers - 1) * slots)) > wait_us


def test_waits_are_those_of_queueing_theory():
    chance = random.Random(1)
    at, work = 0.0, []
    for _ in range(200_000):
        at += chance.expovariate(0.7)
        work.append(Work(round(at * 1000), round(chance.expovariate(1.0) * 1000)))
    found = waits(work, 1)
    # M/M/1 at 70 %: the mean of waiting is 0.7 / 0.3 service times.
    assert abs(sum(found) / len(found) / 1000 - 0.7 / 0.3) < 0.15


def test_no_requests_need_no_worker():
    assert needed([], 50_000, 1, 1000) == (0, 0)
