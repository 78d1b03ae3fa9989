"""Budgets: what is spent beyond one is bounded by the leases of routers that nobody hears from."""

import asyncio
import json
import random
import subprocess
import time
from pathlib import Path

import asyncpg
import grpc
import pytest
from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.storage.database import WRITER_LOCK
from tests.system import processes
from tests.system.conftest import RINGMESH, eventually
from tests.system.ledgers import DAY_MS, HOUR_MS, Ledger, Sender, miss, now_ms, unique

# 3600 an hour: a microsecond costs 1000 nano-units.
HOURLY = 3_600_000_000_000


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    ledger = Ledger(state_dir=tmp_path_factory.mktemp("ledger"), address=processes.free_address())
    told = ledger_pb2.Price(worker_type="cpu", currency="USD", hourly_nano=HOURLY)
    ledger.stub.SetPrice(ledger_pb2.SetPriceRequest(price=told, supersede=True))
    yield ledger
    ledger.stop()


@pytest.fixture
def tenant():
    return unique("tenant")


def set_budget(ledger, period=ledger_pb2.PERIOD_MONTH, currency="USD", **budget):
    """Of a month, unless the test is about its renewal: a day may end while a test runs."""
    budget = ledger_pb2.Budget(period=period, currency=currency, **budget)
    ledger.stub.SetBudget(ledger_pb2.SetBudgetRequest(budget=budget))


def state(ledger, **names):
    found = [
        state
        for state in ledger.stub.ListBudgets(ledger_pb2.ListBudgetsRequest()).budgets
        if all(getattr(state.budget, name) == value for name, value in names.items())
    ]
    (one,) = found
    return one


class Router:
    """Spends from its lease, and knows what a request costs before it is made."""

    def __init__(self, ledger, tenant):
        self.ledger, self.tenant = ledger, tenant
        self.sender = Sender(ledger)
        self.left = self.spent = self.unsent = 0

    def ask(self):
        """Whether the ledger answered."""
        use = ledger_pb2.BudgetUse(tenant=self.tenant, period=ledger_pb2.PERIOD_MONTH, unsent_nano=self.unsent)
        request = ledger_pb2.LeaseRequest(router_id=self.sender.router_id, start_epoch=1, uses=[use])
        try:
            leases = self.ledger.stub.Lease(request, timeout=60).leases
        except grpc.RpcError:
            return False
        self.left = next(lease.amount_nano for lease in leases if lease.budget.tenant == self.tenant)
        return True

    def request(self, us):
        """Whether it was let in."""
        if us * 1000 > self.left:
            return False
        self.left -= us * 1000
        self.spent += us * 1000
        self.unsent += us * 1000
        return True

    def send(self):
        """Whether the ledger has all that was spent."""
        if self.unsent:
            try:
                self.sender.append([miss(self.tenant, compute_us=self.unsent // 1000)])
            except grpc.RpcError:
                return False
            self.unsent = 0
        return True


def test_a_budget_says_what_is_spent_and_when_it_renews(ledger, tenant):
    set_budget(ledger, period=ledger_pb2.PERIOD_DAY, tenant=tenant, soft_nano=2_000_000, hard_nano=5_000_000)
    at_ms = now_ms()
    Sender(ledger).append([miss(tenant, at_ms, compute_us=3000), miss(unique("tenant"), at_ms, compute_us=9000)])
    found = state(ledger, tenant=tenant)
    spent = 3_000_000 if found.begins_ms <= at_ms else 0  # else the day has ended meanwhile
    assert (found.spent_nano, found.soft_reached, found.hard_reached) == (spent, spent > 2_000_000, False)
    assert at_ms // DAY_MS * DAY_MS <= found.begins_ms <= now_ms()
    assert (found.begins_ms % DAY_MS, found.renews_at_ms) == (0, found.begins_ms + DAY_MS)


def test_budgets_of_a_model_and_of_both_count_what_is_theirs(ledger, tenant):
    model = unique("model")
    set_budget(ledger, model=model, soft_nano=1)
    set_budget(ledger, tenant=tenant, model=model, hard_nano=10**9)
    Sender(ledger).append(
        [miss(tenant, compute_us=1000, model=model), miss("x", compute_us=200, model=model), miss(tenant)]
    )
    assert state(ledger, tenant="", model=model).spent_nano == 1_200_000
    assert state(ledger, tenant=tenant, model=model).spent_nano == 1_000_000


def test_routers_share_what_is_left(ledger, tenant):
    set_budget(ledger, tenant=tenant, hard_nano=8_000_000)
    one, other = Router(ledger, tenant), Router(ledger, tenant)
    one.ask()
    other.ask()
    assert (one.left, other.left) == (4_000_000, 2_000_000)
    assert state(ledger, tenant=tenant).leased_nano == 6_000_000
    assert one.request(3000)
    one.ask()
    # 3 are spent and not sent, 2 are the other's: of 3 that are left, half.
    assert one.left == 1_500_000
    one.send()
    one.ask()
    assert one.left == 1_500_000


def test_what_is_spent_never_exceeds_the_budget_while_routers_are_heard(ledger, tenant):
    random.seed(5)
    hard = 10_000_000
    set_budget(ledger, tenant=tenant, hard_nano=hard)
    routers = [Router(ledger, tenant) for _ in range(3)]
    refused = 0
    for _ in range(200):
        router = random.choice(routers)
        match random.randrange(4):
            case 0:
                router.ask()
            case 1:
                router.send()
            case _:
                refused += not router.request(random.randrange(1, 400))
        assert sum(router.spent for router in routers) <= hard
    for _ in range(20):
        for router in routers:
            router.ask()
            while router.request(1):
                pass
            router.send()
    assert refused
    # And all of it can be spent.
    assert sum(router.spent for router in routers) == hard
    assert state(ledger, tenant=tenant).hard_reached


def test_while_the_ledger_is_down_no_more_than_leases_is_spent(ledger, tenant):
    hard = 10_000_000
    set_budget(ledger, tenant=tenant, hard_nano=hard)
    routers = [Router(ledger, tenant) for _ in range(3)]
    leased = time.monotonic()
    for router in routers:
        assert router.ask()
    outstanding = sum(router.left for router in routers)
    ledger.started.process.kill()
    ledger.started.process.wait()
    for router in routers:
        assert not router.ask()
        assert router.request(1)
        while router.request(100):
            pass
        assert not router.send()
    assert outstanding - 300_000 <= sum(router.spent for router in routers) <= outstanding < hard
    ledger.started = processes.start("services.ledger", **ledger.settings)
    # Leases outlive the ledger for 30 s, unless this machine took longer: another router finds only what they leave.
    newcomer = Router(ledger, tenant)
    eventually(newcomer.ask)
    in_time = time.monotonic() < leased + 30
    assert newcomer.left <= hard - outstanding or not in_time
    for router in [*routers, newcomer]:
        assert router.send()
        assert router.ask()
        while router.request(1):
            pass
        assert router.send()
    assert sum(router.spent for router in [*routers, newcomer]) <= hard or not in_time


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"hard_nano": 1}, "of a tenant, of a model, or of both"),
        ({"tenant": "t"}, "a soft bound, a hard one, or both"),
        ({"tenant": "t", "hard_nano": -1}, "hard_nano is -1"),
        ({"tenant": "t", "hard_nano": 5, "soft_nano": 6}, "the soft bound is at most the hard one"),
        ({"tenant": "t", "hard_nano": 5, "currency": "EUR"}, "this ledger counts in USD"),
        ({"tenant": "t", "hard_nano": 5, "period": 0}, "period is DAY or MONTH"),
    ],
)
def test_a_budget_that_is_wrong_is_refused(ledger, wrong, complaint):
    with pytest.raises(grpc.RpcError) as refused:
        set_budget(ledger, **wrong)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert complaint in refused.value.details()


def test_a_budget_that_is_deleted_bounds_nothing(ledger, tenant):
    set_budget(ledger, tenant=tenant, hard_nano=5)
    request = ledger_pb2.DeleteBudgetRequest(tenant=tenant, period=ledger_pb2.PERIOD_MONTH)
    ledger.stub.DeleteBudget(request)
    with pytest.raises(grpc.RpcError, match="there is no budget of tenant"):
        ledger.stub.DeleteBudget(request)


def test_the_command_line_sets_and_lists_budgets(ledger, tenant):
    command = [*RINGMESH, "budgets"]
    where = ["--ledger", ledger.started.address]
    done = subprocess.run(
        [*command, "set", "--tenant", tenant, "--hard", "12.5", *where], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(subprocess.run([*command, "--json", *where], capture_output=True, check=True, timeout=120).stdout)
    (found,) = [one for one in told["budgets"] if one["budget"]["tenant"] == tenant]
    assert (found["budget"]["period"], found["budget"]["hard_nano"]) == ("month", 12_500_000_000)
    assert tenant in subprocess.run([*command, *where], capture_output=True, check=True, timeout=120, text=True).stdout


def lease_of(ledger, router_id, epoch, tenant):
    """The lease of the tenant's budget."""
    answer = ledger.stub.Lease(ledger_pb2.LeaseRequest(router_id=router_id, start_epoch=epoch), timeout=60)
    return next(lease for lease in answer.leases if lease.budget.tenant == tenant)


def test_two_routers_of_one_id_hold_leases_of_their_own(ledger, tenant):
    set_budget(ledger, tenant=tenant, hard_nano=8_000_000)
    router_id = unique("router")
    assert lease_of(ledger, router_id, 5, tenant).amount_nano == 4_000_000
    # A life that begins takes the place of the one before; which, if it still runs, asks again.
    assert lease_of(ledger, router_id, 6, tenant).amount_nano == 4_000_000
    amounts = [lease_of(ledger, router_id, epoch, tenant).amount_nano for epoch in (5, 6, 5, 6)]
    assert amounts[:2] == [2_000_000, 3_000_000]
    assert sum(amounts[-2:]) <= 8_000_000
    assert state(ledger, tenant=tenant).leased_nano == sum(amounts[-2:])


def test_routers_share_the_next_period(ledger, tenant):
    set_budget(ledger, tenant=tenant, hard_nano=10**12)
    routers = [unique("router") for _ in range(3)]
    for router in routers:
        lease_of(ledger, router, 1, tenant)
    parts = [lease_of(ledger, router, 1, tenant).next_nano for router in routers]
    # Those of routers of other tests may not have expired yet.
    assert min(parts) > 0
    assert sum(parts) <= 10**12


def test_what_a_router_whose_clock_is_ahead_recorded_is_spent(ledger, tenant):
    set_budget(ledger, tenant=tenant, hard_nano=8_000_000)
    renews_at_ms = state(ledger, tenant=tenant).renews_at_ms
    at_ms = min(now_ms() + 2 * HOUR_MS, renews_at_ms - 1)
    Sender(ledger).append([miss(tenant, at_ms, compute_us=3000)])
    assert state(ledger, tenant=tenant).spent_nano == 3_000_000
    assert lease_of(ledger, unique("router"), 1, tenant).amount_nano == 2_500_000


def test_leases_wait_for_no_batch_that_is_written(ledger, tenant):
    set_budget(ledger, tenant=tenant, hard_nano=8_000_000)

    async def ask_while_somebody_writes():
        folder = Path(ledger.settings["state_dir"]) / "postgres"
        holder = await asyncpg.connect(host=str(folder), user="ringmesh", database="postgres")
        async with holder.transaction():
            await holder.execute(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")
            found = await asyncio.to_thread(lease_of, ledger, unique("router"), 1, tenant)
        await holder.close()
        return found

    assert asyncio.run(ask_while_somebody_writes()).amount_nano == 4_000_000
