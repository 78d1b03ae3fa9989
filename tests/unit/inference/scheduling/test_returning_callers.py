from services.inference.scheduling.returning_callers import MISSES, PROBE, SHARE, ReturningCallers

RUN = 1_000_000


def test_all_callers_of_a_batch_are_waited_for_and_for_a_part_of_its_run_at_most():
    callers = ReturningCallers()
    callers.answered(64, 20, RUN, 5)
    assert callers.wait_until(63) == 5 + RUN * SHARE
    assert callers.wait_until(64) == 0


def test_nobody_is_waited_for_before_a_batch_has_run_or_twice():
    callers = ReturningCallers()
    assert callers.wait_until(1) == 0
    callers.answered(64, 0, RUN, 5)
    callers.began(64)
    assert callers.wait_until(1) == 0


def waits(callers, came, batches):
    """Before how many of so many batches it waited, where so many of 32 came back."""
    waited = 0
    for _ in range(batches):
        callers.answered(64, 32, RUN, 5)
        waited += callers.wait_until(32) > 0
        callers.began(32 + came)
    return waited


def test_callers_who_do_not_come_back_are_soon_not_waited_for_but_tried_again_now_and_then():
    callers = ReturningCallers()
    assert waits(callers, 0, 10 * PROBE) == MISSES + 10
    assert waits(callers, 32, 10 * PROBE) > 9 * PROBE


def test_half_of_them_are_worth_the_wait():
    assert waits(ReturningCallers(), 16, 100) == 100
    assert waits(ReturningCallers(), 15, 100) < 10
