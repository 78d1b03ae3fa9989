from types import SimpleNamespace

import pytest

from router.accounting.cost import CostMetrics, Prices
from router.accounting.request_metrics import OK, RequestMetrics
from services.console.data.units import UNKNOWN, money


@pytest.fixture
def made():
    """What is held and the time, to be set; the requests; and their cost where every model runs on CUDA but `plain`."""
    state = SimpleNamespace(held=0, now=0.0)
    requests = RequestMetrics()

    def provider(model, version):
        return "CPUExecutionProvider" if model == "plain" else "CUDAExecutionProvider"

    prices = Prices(2.0, 10.0, 0.5, "EUR")
    return state, requests, CostMetrics(prices, requests, provider, lambda: state.held, lambda: state.now)


def told(cost, name):
    return {sample.labels: sample.value for sample in cost.samples() if sample.family.name == name}


def test_compute_is_priced_by_what_runs_the_model_and_told_apart_from_what_was_saved(made):
    _, requests, cost = made
    for model in ("plain", "heavy"):
        requests.count(("ModelInfer", model, "1", "shop", OK, "miss"), 1, 500_000)
        requests.count(("ModelInfer", model, "1", "shop", OK, "hit-local"), 1, 500_000)
        requests.count(("ModelInfer", model, "1", "shop", OK, "hit-local"), 1, 500_000)
    found = told(cost, "ringmesh_cost_total")
    assert found["plain", "1", "shop", "spent"] == pytest.approx(1.0)
    assert found["plain", "1", "shop", "saved"] == pytest.approx(2.0)
    assert found["heavy", "1", "shop", "spent"] == pytest.approx(5.0)


def test_memory_is_priced_for_as_long_as_it_is_held(made):
    state, _, cost = made
    state.held = 2 * 10**9
    for _ in range(10):
        state.now += 180
        list(cost.samples())
    state.held = 0
    state.now += 10**6
    assert told(cost, "ringmesh_cost_total")["", "", "", "memory"] == pytest.approx(2 * 0.5 * 0.5)


def test_prices_are_told_with_their_currency(made):
    _, _, cost = made
    found = told(cost, "ringmesh_price")
    assert found == {("cpu_second", "EUR"): 2.0, ("gpu_second", "EUR"): 10.0, ("memory_gb_hour", "EUR"): 0.5}


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (1234.5, "1,234"), (12.345, "12.35"), (0.5, "0.50"), (0.0042, "0.0042"), (3.14e-6, "0.0000031"),
     (0.00001, "0.00001"), (0.02, "0.02"), (float("nan"), UNKNOWN)],
)  # fmt: skip
def test_money_shows_what_is_small_too(value, words):
    assert money(value) == words
