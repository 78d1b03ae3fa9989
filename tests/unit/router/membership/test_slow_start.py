from router.membership.slow_start import FIRST, SECONDS, SlowStart
from tests.unit.clock import Clock


def test_a_newcomer_starts_with_a_tenth_and_ends_whole():
    clock = Clock()
    slow_start = SlowStart(clock)
    clock.now = 100.0
    slow_start.begin("a")
    ramps = []
    for _ in range(12):
        ramps.append(slow_start.ramp("a"))
        clock.now += SECONDS / 10
    assert ramps[0] == FIRST
    assert ramps == sorted(ramps)
    assert ramps[-1] == 1.0


def test_to_a_router_that_has_just_started_nobody_is_a_newcomer():
    slow_start = SlowStart(Clock())
    slow_start.begin("a")
    assert slow_start.ramp("a") == 1.0


def test_who_never_began_has_always_been_there():
    assert SlowStart(Clock()).ramp("a") == 1.0
