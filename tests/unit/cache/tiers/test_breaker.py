from cache.tiers.breaker import Breaker
from tests.unit.clock import Clock


def test_after_a_failure_nothing_passes_until_the_pause_is_over_and_then_one_probe():
    clock = Clock()
    breaker = Breaker(clock, first_pause=1.0, longest_pause=4.0, spread=0)
    breaker.failure()
    assert [breaker.allow(), breaker.is_open] == [False, True]
    clock.now = 1.0
    assert [breaker.allow(), breaker.allow()] == [True, False]


def test_the_pause_doubles_with_each_failed_probe_up_to_the_longest():
    clock = Clock()
    breaker = Breaker(clock, first_pause=1.0, longest_pause=4.0, spread=0)
    breaker.failure()
    pauses = []
    for _ in range(4):
        start = clock.now
        while not breaker.allow():
            clock.now += 0.5
        pauses.append(clock.now - start)
        breaker.failure()
    assert pauses == [1.0, 2.0, 4.0, 4.0]


def test_a_successful_probe_closes_it_and_the_next_pause_is_short_again():
    clock = Clock()
    breaker = Breaker(clock, first_pause=1.0, spread=0)
    breaker.failure()
    clock.now = 1.0
    assert breaker.allow()
    breaker.success()
    assert breaker.allow()
    assert not breaker.is_open
    breaker.failure()
    clock.now = 2.0
    assert breaker.allow()


def test_the_breakers_of_a_fleet_do_not_probe_all_at_once():
    clock = Clock()
    breakers = [Breaker(clock, first_pause=1.0, spread=0.5) for _ in range(100)]
    for breaker in breakers:
        breaker.failure()
    clock.now = 1.25
    assert 0 < sum(breaker.allow() for breaker in breakers) < 100
    clock.now = 1.5
    assert all(breaker.allow() or breaker.is_open for breaker in breakers)
