"""What a router may spend of budgets."""

import pytest
from ringmesh.ledger.v1 import ledger_pb2

from router.accounting.budgets import Budgets
from services.runtime.errors import ResourceExhaustedError
from tests.unit.clock import Clock

MONTH = 1_796_083_200_000  # 2026-12-01
RATES = {"cpu": 1_000_000, "router": 1000}


def leases(*amounts, next_nano=0, renews_at_ms=MONTH, **names):
    budget = ledger_pb2.Budget(period=ledger_pb2.PERIOD_MONTH, hard_nano=5 * 10**9, currency="USD", **names)
    made = [
        ledger_pb2.BudgetLease(budget=budget, amount_nano=amount, renews_at_ms=renews_at_ms, next_nano=next_nano)
        for amount in amounts
    ]
    return ledger_pb2.LeaseResponse(leases=made, nano_per_second=RATES)


def renew(budgets, answer):
    request, spent = budgets.request("router", 1)
    budgets.renewed(answer, spent)
    return [use.unsent_nano for use in request.uses]


def test_a_request_is_refused_once_its_lease_is_spent():
    budgets = Budgets(lambda: MONTH / 1000 - 1)
    renew(budgets, leases(10, tenant="acme", model="mlp"))
    budgets.charge("acme", "mlp", "cpu", 9, 0)
    budgets.check("acme", "mlp")
    budgets.charge("acme", "mlp", "cpu", 1, 0)
    with pytest.raises(ResourceExhaustedError) as refused:
        budgets.check("acme", "mlp")
    assert refused.value.retry_after is None
    assert refused.value.message == (
        "the budget of tenant 'acme' and model 'mlp', 5 USD a month, is used up; it renews at 2026-12-01 00:00 UTC"
    )
    budgets.check("acme", "other")
    budgets.check("", "mlp")


@pytest.mark.parametrize(
    ("hard_nano", "shown"),
    [(100, "0.0000001"), (2_500_000_000, "2.5"), (1000 * 10**9, "1,000"), (1_234_567 * 10**9, "1,234,567")],
)
def test_a_refusal_names_the_budget_as_it_was_set(hard_nano, shown):
    budgets = Budgets(lambda: MONTH / 1000 - 1)
    answer = leases(1, tenant="acme")
    answer.leases[0].budget.hard_nano = hard_nano
    renew(budgets, answer)
    budgets.charge("acme", "mlp", "cpu", 1, 0)
    with pytest.raises(ResourceExhaustedError, match=f"the budget of tenant 'acme', {shown} USD a month, is used up"):
        budgets.check("acme", "mlp")


@pytest.mark.parametrize("names", [{"tenant": "acme"}, {"model": "mlp"}, {"tenant": "acme", "model": "mlp"}])
def test_a_budget_is_charged_for_its_own(names):
    budgets = Budgets(lambda: MONTH / 1000 - 1)
    renew(budgets, leases(1, **names))
    budgets.charge("other", "other", "cpu", 100, 0)
    budgets.check("acme", "mlp")
    budgets.charge("acme", "mlp", "cpu", 1, 0)
    with pytest.raises(ResourceExhaustedError):
        budgets.check("acme", "mlp")


def test_hits_are_charged_by_fractions_of_a_nano():
    budgets = Budgets(lambda: MONTH / 1000 - 1)
    renew(budgets, leases(1, tenant="acme"))
    for _ in range(1000):
        budgets.check("acme", "mlp")
        budgets.charge("acme", "mlp", "cpu", 0, 1000)
    with pytest.raises(ResourceExhaustedError):
        budgets.check("acme", "mlp")


def test_what_is_spent_while_a_lease_is_asked_for_counts_against_it():
    budgets = Budgets(lambda: MONTH / 1000 - 1)
    renew(budgets, leases(10, tenant="acme"))
    _, spent = budgets.request("router", 1)
    budgets.charge("acme", "mlp", "cpu", 8, 0)
    budgets.renewed(leases(5, tenant="acme"), spent)
    with pytest.raises(ResourceExhaustedError):
        budgets.check("acme", "mlp")


def test_the_ledger_hears_what_it_has_no_record_of():
    budgets = Budgets(lambda: MONTH / 1000 - 1)
    renew(budgets, leases(100, tenant="acme"))
    budgets.charge("acme", "mlp", "cpu", 7, 0)
    marks = budgets.marks()
    budgets.charge("acme", "mlp", "cpu", 2, 1)
    assert renew(budgets, leases(100, tenant="acme")) == [10]
    budgets.delivered(marks)
    assert renew(budgets, leases(100, tenant="acme")) == [3]


def test_a_budget_that_is_gone_limits_nothing():
    budgets = Budgets(lambda: MONTH / 1000 - 1)
    renew(budgets, leases(0, tenant="acme"))
    with pytest.raises(ResourceExhaustedError):
        budgets.check("acme", "mlp")
    renew(budgets, leases())
    assert not budgets.limits
    budgets.check("acme", "mlp")


def lets_in(budgets, nano):
    """How many requests of a nano-unit of `nano` that come."""
    allowed = 0
    for _ in range(nano):
        try:
            budgets.check("acme", "mlp")
        except ResourceExhaustedError:
            continue
        budgets.charge("acme", "mlp", "cpu", 1, 0)
        allowed += 1
    return allowed


def test_of_a_period_that_begins_while_the_ledger_is_down_a_router_spends_its_part():
    now = MONTH / 1000 - 1
    budgets = Budgets(lambda: now)
    renew(budgets, leases(5, next_nano=7, tenant="acme", model="mlp"))
    assert lets_in(budgets, 3) == 3
    now += 1
    assert lets_in(budgets, 20) == 7  # and nothing of what was left before
    now += 30.9 * 86_400
    assert lets_in(budgets, 20) == 0
    now += 0.2 * 86_400
    assert lets_in(budgets, 20) == 7


def test_a_router_that_is_newer_than_its_ledger_refuses_nothing_where_a_period_begins():
    clock = Clock(MONTH / 1000 - 1)
    budgets = Budgets(clock)
    answer = leases(5, tenant="acme")
    answer.leases[0].budget.hard_nano = 12
    renew(budgets, answer)
    clock.now += 1
    assert lets_in(budgets, 20) == 6
    renew(budgets, leases(3, renews_at_ms=MONTH + 31 * 86_400_000, tenant="acme"))
    assert lets_in(budgets, 20) == 3


def test_a_router_whose_clock_was_ahead_and_is_set_back_spends_from_the_ledgers_lease():
    clock = Clock(MONTH / 1000 + 1)
    budgets = Budgets(clock)
    renew(budgets, leases(5, next_nano=7, tenant="acme"))
    assert lets_in(budgets, 20) == 7
    renew(budgets, leases(5, next_nano=7, tenant="acme"))
    assert lets_in(budgets, 20) == 0
    clock.now -= 3600
    renew(budgets, leases(5, next_nano=7, tenant="acme"))
    assert lets_in(budgets, 20) == 5


def test_a_ledger_whose_clock_is_set_back_over_a_renewal_grants_no_second_budget():
    budgets = Budgets(Clock(MONTH / 1000 + 1))
    after = MONTH + 31 * 86_400_000
    renew(budgets, leases(5, next_nano=7, renews_at_ms=after, tenant="acme"))
    assert lets_in(budgets, 3) == 3
    for _ in range(3):
        renew(budgets, leases(5, next_nano=7, tenant="acme"))
        lets_in(budgets, 20)
    assert budgets.marks()[0][1] == 5 * 10**9
    renew(budgets, leases(4, next_nano=7, renews_at_ms=after, tenant="acme"))
    assert lets_in(budgets, 20) == 4


def test_a_router_whose_clock_is_ahead_spends_its_part_of_the_next_period_once():
    now = MONTH / 1000 + 1
    budgets = Budgets(lambda: now)
    for _ in range(5):
        renew(budgets, leases(5, next_nano=7, tenant="acme", model="mlp"))
        lets_in(budgets, 20)
    assert budgets.marks()[0][1] == 7 * 10**9
    # The ledger is there, too.
    renew(budgets, leases(4, next_nano=7, renews_at_ms=MONTH + 31 * 86_400_000, tenant="acme", model="mlp"))
    assert lets_in(budgets, 20) == 4


def test_a_router_whose_clock_was_ahead_and_is_set_back_has_the_ledgers_leases_again():
    now = MONTH / 1000 + 365 * 86_400
    budgets = Budgets(lambda: now)
    answer = leases(5, next_nano=7, tenant="acme", model="mlp")
    renew(budgets, answer)
    assert lets_in(budgets, 20) == 7
    now = MONTH / 1000 - 1
    renew(budgets, answer)
    assert lets_in(budgets, 20) == 5
