import pytest

from router.accounting.request_metrics import OK, RequestMetrics, outcome_of
from router.accounting.slo import Slo
from tests.unit.clock import Clock


@pytest.fixture
def made():
    clock, requests = Clock(), RequestMetrics()
    return clock, requests, Slo({"availability": 0.999, "latency": 0.99}, 0.3, requests, clock)


def answered(requests, times, ns=1_000_000, code=OK, method="ModelInfer"):
    for _ in range(times):
        requests.count((method, "m", "1", "", code, "miss"), ns, 1)


def burn(slo):
    return {s.labels: s.value for s in slo.samples() if s.family.name == "ringmesh_slo_burn_rate"}


def minutes(clock, slo, count):
    for _ in range(count):
        clock.now += 60
        slo.sample()


def test_nothing_burns_where_nothing_was_asked(made):
    _, _, slo = made
    assert set(burn(slo).values()) == {0.0}


def test_failures_of_ours_burn_and_those_of_callers_do_not(made):
    _, requests, slo = made
    answered(requests, 980)
    answered(requests, 10, code="INVALID_ARGUMENT")
    answered(requests, 10, code="UNAVAILABLE")
    assert burn(slo)["availability", "5m"] == pytest.approx(0.01 / 0.001)


@pytest.mark.parametrize("kind", ["quota", "bytes", "concurrency", "budget", "too_large"])
def test_limits_of_callers_do_not_burn_and_overload_does(made, kind):
    _, requests, slo = made
    answered(requests, 980)
    for of, times in ((kind, 10), ("overload", 10)):
        for _ in range(times):
            requests.count(("ModelInfer", "m", "1", "", "RESOURCE_EXHAUSTED", outcome_of(of)), 1000, 0)
    assert burn(slo)["availability", "5m"] == pytest.approx(0.01 / 0.001)
    assert requests.answers() == (1000, 10)


def test_late_answers_burn_and_failures_are_not_answers(made):
    _, requests, slo = made
    answered(requests, 96, ns=299_000_000)
    answered(requests, 4, ns=301_000_000)
    answered(requests, 100, ns=10**9, code="UNAVAILABLE")
    assert burn(slo)["latency", "5m"] == pytest.approx(0.04 / 0.01)


def test_a_short_window_forgets_what_a_long_one_remembers(made):
    clock, requests, slo = made
    answered(requests, 100, code="UNAVAILABLE")
    minutes(clock, slo, 10)
    answered(requests, 100)
    minutes(clock, slo, 1)
    found = burn(slo)
    assert found["availability", "5m"] == 0.0
    assert found["availability", "1h"] == pytest.approx(0.5 / 0.001)


def test_what_is_older_than_three_days_is_forgotten(made):
    clock, requests, slo = made
    answered(requests, 100, code="UNAVAILABLE")
    minutes(clock, slo, 3 * 24 * 60 + 2)
    answered(requests, 1)
    assert burn(slo)["availability", "3d"] == 0.0


def test_a_step_of_an_ensemble_is_no_request(made):
    _, requests, slo = made
    answered(requests, 10, code="UNAVAILABLE", method="step")
    assert burn(slo)["availability", "3d"] == 0.0
