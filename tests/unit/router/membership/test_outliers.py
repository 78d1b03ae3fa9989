import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.membership.outliers import (
    CONSECUTIVE_FAILURES,
    FIRST_EJECTION,
    LARGEST_SHARE,
    LEAST_ANSWERS,
    LONGEST_EJECTION,
    WINDOW_SECONDS,
    Outliers,
)
from tests.unit.clock import Clock

FLEET = ["a", "b", "c", "d"]
ASKED = dict.fromkeys(FLEET, True)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def outliers(clock):
    return Outliers(clock)


def fail(outliers, worker, times=CONSECUTIVE_FAILURES):
    for _ in range(times):
        outliers.failed(worker)


def window(outliers, clock, seconds, model=b"m", answers=LEAST_ANSWERS):
    """A window in which each worker takes so long; who is ejected at its end."""
    for _ in range(answers):
        for worker, taken in seconds.items():
            outliers.answered(worker, model, taken)
    clock.now += WINDOW_SECONDS
    return outliers.ejected(ASKED)


def test_failures_in_a_row_eject_and_an_answer_in_between_does_not(outliers):
    fail(outliers, "a", CONSECUTIVE_FAILURES - 1)
    outliers.answered("a", b"m", 0.01)
    fail(outliers, "a", CONSECUTIVE_FAILURES - 1)
    assert outliers.ejected(ASKED) == {}
    fail(outliers, "a", 1)
    assert "3 attempts in a row failed" in outliers.ejected(ASKED)["a"]


def test_each_ejection_is_twice_as_long_up_to_the_longest(outliers, clock):
    lengths = []
    for _ in range(8):
        fail(outliers, "a")
        assert "a" in outliers.ejected(ASKED)
        since = clock.now
        while "a" in outliers.ejected(ASKED):
            clock.now += 0.5
        lengths.append(clock.now - since)
    assert lengths[:3] == [FIRST_EJECTION, FIRST_EJECTION * 2, FIRST_EJECTION * 4]
    assert lengths[-1] == LONGEST_EJECTION


def test_good_windows_take_the_back_off_back(outliers, clock):
    for _ in range(3):
        fail(outliers, "a")
        outliers.ejected(ASKED)
        clock.now += LONGEST_EJECTION
        outliers.ejected(ASKED)
    for _ in range(3):
        window(outliers, clock, dict.fromkeys(FLEET, 0.01))
    fail(outliers, "a")
    assert outliers.ejected(ASKED)["a"].startswith(f"ejected for {FIRST_EJECTION:g} s")


def test_one_much_slower_than_the_others_is_ejected_after_two_windows(outliers, clock):
    taken = {"a": 0.31, "b": 0.01, "c": 0.012, "d": 0.011}
    assert window(outliers, clock, taken) == {}
    assert "slower than the others" in window(outliers, clock, taken)["a"]


def test_a_heavier_model_is_not_a_slower_worker(outliers, clock):
    for _ in range(5):
        for _ in range(LEAST_ANSWERS):
            outliers.answered("a", b"heavy", 0.9)
            for worker in ("b", "c", "d"):
                outliers.answered(worker, b"light", 0.01)
        clock.now += WINDOW_SECONDS
        assert outliers.ejected(ASKED) == {}


def test_slower_by_what_nobody_feels_is_no_outlier(outliers, clock):
    for _ in range(5):
        assert window(outliers, clock, {"a": 0.03, "b": 0.001, "c": 0.001, "d": 0.001}) == {}


def test_a_fleet_that_is_slow_as_a_whole_has_no_outlier(outliers, clock):
    for seconds in (0.01, 1.0, 1.0, 1.0):
        assert window(outliers, clock, dict.fromkeys(FLEET, seconds)) == {}


def test_a_few_answers_judge_nobody(outliers, clock):
    taken = {"a": 5.0, "b": 0.01}
    for _ in range(LEAST_ANSWERS // 2 - 1):
        assert window(outliers, clock, taken, answers=2) == {}


def test_who_is_so_slow_that_it_gives_few_answers_is_ejected_when_there_are_enough(outliers, clock):
    for _ in range(2 * LEAST_ANSWERS // 2 - 1):
        assert window(outliers, clock, {"a": 5.0, "b": 0.01}, answers=2) == {}
    assert "slower than the others" in window(outliers, clock, {"a": 5.0, "b": 0.01}, answers=2)["a"]


@pytest.mark.parametrize(("size", "most"), [(1, 0), (2, 1), (3, 1), (6, 2), (30, 10)])
def test_no_more_than_a_share_of_the_fleet_is_ejected(outliers, size, most):
    fleet = {f"w{index}": True for index in range(size)}
    for worker in fleet:
        fail(outliers, worker)
    assert len(outliers.ejected(fleet)) == most


def test_who_cannot_be_asked_is_judged_when_it_can_be_and_keeps_nobody_else_in(outliers, clock):
    fail(outliers, "a")
    assert outliers.ejected(ASKED | {"a": False}) == {}
    fail(outliers, "b")
    assert [*outliers.ejected(ASKED | {"a": False})] == ["b"]
    # Lost while it is ejected, it stays so, and another may be too.
    fail(outliers, "c")
    assert {*outliers.ejected(ASKED | {"b": False})} == {"a", "b"}
    clock.now += FIRST_EJECTION
    assert {*outliers.ejected(ASKED)} == {"c"}


EVENTS = st.lists(st.tuples(st.sampled_from(FLEET), st.sampled_from(["answer", "slow", "fail", "wait"])), max_size=200)


@settings(max_examples=50, deadline=None)
@given(EVENTS)
def test_whatever_happens_the_cap_holds_and_everybody_comes_back(events):
    clock = Clock()
    outliers = Outliers(clock)
    for worker, what in events:
        if what == "answer":
            outliers.answered(worker, b"m", 0.01)
        elif what == "slow":
            outliers.answered(worker, b"m", 2.0)
        elif what == "fail":
            outliers.failed(worker)
        else:
            clock.now += WINDOW_SECONDS
        assert len(outliers.ejected(ASKED)) <= max(1, int(len(FLEET) * LARGEST_SHARE))
    for worker in FLEET:
        outliers.answered(worker, b"m", 0.01)
    clock.now += LONGEST_EJECTION * 2
    outliers.ejected(ASKED)
    clock.now += LONGEST_EJECTION * 2
    assert outliers.ejected(ASKED) == {}
