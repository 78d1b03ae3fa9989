from hypothesis import given
from hypothesis import strategies as st

from router.dispatch.retry_budget import RESERVE_PER_SECOND, SHARE, WINDOW_SECONDS, RetryBudget
from tests.unit.router.admission.test_admission import Clock

RESERVE = RESERVE_PER_SECOND * WINDOW_SECONDS


def taken(budget, times):
    return sum(budget.take() for _ in range(times))


def test_with_little_traffic_the_reserve_can_be_retried():
    assert taken(RetryBudget(Clock()), 1000) == RESERVE


def test_a_share_of_the_traffic_can_be_retried():
    budget = RetryBudget(Clock())
    for _ in range(10_000):
        budget.request()
    assert taken(budget, 10_000) == SHARE * 10_000 + RESERVE


def test_what_is_longer_ago_than_the_window_does_not_count():
    clock = Clock()
    budget = RetryBudget(clock)
    for _ in range(10_000):
        budget.request()
    taken(budget, 1000)
    clock.now += WINDOW_SECONDS
    assert taken(budget, 10_000) == RESERVE


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=500))
def test_in_no_window_are_there_more_retries_than_the_share_and_the_reserve(steps):
    clock = Clock()
    budget = RetryBudget(clock)
    requests, retries = [], []
    for pause, is_request in steps:
        clock.now += pause
        if is_request:
            budget.request()
            requests.append(clock.now)
        elif budget.take():
            retries.append(clock.now)
        recent = lambda times: sum(t > clock.now - WINDOW_SECONDS + 1 for t in times)  # noqa: E731
        assert recent(retries) <= SHARE * len(requests) + RESERVE
