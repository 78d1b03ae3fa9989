"""What routers tell the ledger of a running stack: every request once, with what it used."""

import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import grpc
import pytest
from ringmesh.ledger.v1 import ledger_pb2, ledger_pb2_grpc

from tests.system.conftest import RINGMESH, eventually
from tests.system.ledgers import HOUR_MS, now_ms, unique
from tests.system.test_cache import fresh

INFER = "/inference.GRPCInferenceService/ModelInfer"


class Tenant:
    """A caller that counts what it observes."""

    def __init__(self, channel):
        self.name = unique("tenant")
        self._infer = channel.unary_unary(INFER)
        self.requests = self.hits = self.errors = self.computed_us = self.saved_us = 0

    def send(self, request, metadata=()):
        """The trailing metadata; empty if it failed."""
        return self._observe(self._answer(request, metadata))

    def send_together(self, requests):
        with ThreadPoolExecutor(16) as threads:
            for answer in threads.map(self._answer, requests):
                self._observe(answer)

    def _answer(self, request, metadata=()):
        metadata = (("ringmesh-tenant", self.name), *metadata)
        try:
            return self._infer.with_call(request.SerializeToString(), timeout=120, metadata=metadata)[1]
        except grpc.RpcError as error:
            return error

    def _observe(self, call):
        self.requests += 1
        if call.code() is not grpc.StatusCode.OK:
            self.errors += 1
            self.error = call
            return {}
        told = dict(call.trailing_metadata())
        us = int(told["ringmesh-compute-us"])
        if told["ringmesh-cache"] == "miss":
            self.computed_us += us
        else:
            self.hits += 1
            self.saved_us += us
        return told

    def observed(self):
        return self.requests, self.hits, self.errors, self.computed_us, self.saved_us


@pytest.fixture
def channel(stack):
    with grpc.insecure_channel(stack.router) as opened:
        yield opened


@pytest.fixture
def ledger(stack):
    with grpc.insecure_channel(stack.ledger) as opened:
        yield ledger_pb2_grpc.LedgerServiceStub(opened)


def rows(ledger, *by, **question):
    groups = [ledger_pb2.Group.Value(f"GROUP_{group.upper()}") for group in by]
    request = ledger_pb2.ReportRequest(by=groups, from_ms=now_ms() - HOUR_MS, limit=10_000, **question)
    return ledger.Report(request, timeout=120, wait_for_ready=True).rows


def counted(ledger, tenant):
    """As `observed`; None while the ledger has nothing, or is down."""
    with suppress(grpc.RpcError):
        for row in rows(ledger, "tenant", tenant=tenant.name):
            return row.requests, row.hits, row.errors, row.compute_us, row.saved_us
    return None


def assert_counted(ledger, *tenants):
    with suppress(AssertionError):
        eventually(lambda: all(counted(ledger, tenant) == tenant.observed() for tenant in tenants))
    assert [counted(ledger, tenant) for tenant in tenants] == [tenant.observed() for tenant in tenants]


def wrong():
    request = fresh()
    request.inputs[0].name = "z"
    return request


def unknown():
    request = fresh()
    request.model_name = "no such model"
    return request


def send_some(tenant, misses, repeats):
    for _ in range(misses):
        request = fresh()
        for _ in range(1 + repeats):
            tenant.send(request)
    tenant.send(wrong())
    tenant.send(unknown())


def test_the_ledger_counts_what_callers_observed(stack, channel, ledger):
    tenants = Tenant(channel), Tenant(channel)
    send_some(tenants[0], misses=5, repeats=20)
    send_some(tenants[1], misses=3, repeats=7)
    tenants[1].send_together([fresh() for _ in range(200)] + [fresh()] * 50)
    assert_counted(ledger, *tenants)
    command = [*RINGMESH, "cost", "--by", "tenant", "--since", "1h", "--json", "--state", stack.state]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=180).stdout)
    by_tenant = {row["tenant"]: row for row in shown["rows"]}
    for tenant in tenants:
        row = by_tenant[tenant.name]
        assert (row["requests"], row["hits"], row["errors"]) == tenant.observed()[:3]
        assert (row["compute_us"], row["saved_us"]) == (tenant.computed_us, tenant.saved_us)
        assert row["cost_nano"] > 0
        assert row["saved_nano"] > 0


def test_a_traced_request_is_found_by_its_trace(channel, ledger):
    tenant = Tenant(channel)
    request = fresh()
    trace_ids = [f"{now_ms():032x}", f"{now_ms() + 1:032x}"]
    for trace_id in trace_ids:
        tenant.send(request, (("traceparent", f"00-{trace_id}-{1:016x}-01"),))
    assert_counted(ledger, tenant)
    miss, hit = (rows(ledger, trace_id=trace_id)[0] for trace_id in trace_ids)
    assert (miss.request.outcome, hit.request.outcome) == ("miss", "hit-local")
    assert miss.compute_us == hit.saved_us == tenant.computed_us
    assert miss.request_bytes == hit.request_bytes == len(request.SerializeToString())
    assert miss.response_bytes == hit.response_bytes > 0
    assert (miss.request.batch_requests, miss.request.batch_rows) == (1, 1)
    assert miss.total_us >= miss.request.queue_us + miss.request.run_us
    assert hit.router_us == hit.total_us


def test_a_tenant_over_its_budget_is_refused_until_the_budget_is_gone(channel, ledger):
    tenant, other = Tenant(channel), Tenant(channel)
    request = fresh()
    tenant.send(request)
    period = ledger_pb2.PERIOD_MONTH
    budget = ledger_pb2.Budget(tenant=tenant.name, period=period, hard_nano=1, currency="USD")
    ledger.SetBudget(ledger_pb2.SetBudgetRequest(budget=budget), timeout=120)
    eventually(lambda: not tenant.send(request))
    for again in (request, fresh()):
        assert not tenant.send(again)
        assert tenant.error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"the budget of tenant '{tenant.name}', 0.000000001 USD a month, is used up" in tenant.error.details()
        assert "it renews at" in tenant.error.details()
    assert other.send(request)
    ledger.DeleteBudget(ledger_pb2.DeleteBudgetRequest(tenant=tenant.name, period=period), timeout=120)
    eventually(lambda: tenant.send(request))
    assert_counted(ledger, tenant, other)


def test_while_the_ledger_is_killed_requests_are_answered_and_counted(stack, channel, ledger):
    tenant = Tenant(channel)
    send_some(tenant, misses=2, repeats=5)
    os.kill(stack.pids["ledger"], signal.SIGKILL)
    for _ in range(5):
        send_some(tenant, misses=4, repeats=5)
    assert tenant.errors == 12
    assert_counted(ledger, tenant)


@pytest.mark.proof
def test_an_idle_router_that_is_killed_twice_in_a_row_loses_nothing_and_counts_nothing_again(stack, channel, ledger):
    tenant = Tenant(channel)
    send_some(tenant, misses=3, repeats=10)
    assert_counted(ledger, tenant)
    for _ in range(2):
        killed = stack.pids["router"]
        os.kill(killed, signal.SIGKILL)
        eventually(lambda killed=killed: stack.pids["router"] not in (killed, 0))
    eventually(lambda: Tenant(channel).send(fresh()))
    later = Tenant(channel)
    send_some(later, misses=2, repeats=3)
    assert_counted(ledger, tenant, later)


@pytest.mark.proof
def test_a_router_that_is_killed_loses_only_what_it_had_not_spooled(stack, channel, ledger):
    tenant = Tenant(channel)
    send_some(tenant, misses=5, repeats=20)
    assert_counted(ledger, tenant)
    for _ in range(3):
        before = counted(ledger, tenant)[0]
        request = fresh()
        answered = sum(bool(tenant.send(request)) for _ in range(500))
        os.kill(stack.pids["router"], signal.SIGKILL)
        # A request of its next life, after which all of its earlier one is sent.
        later = Tenant(channel)
        eventually(lambda later=later, request=request: later.send(request))
        eventually(lambda later=later: counted(ledger, later) is not None)
        assert before <= counted(ledger, tenant)[0] <= before + answered
