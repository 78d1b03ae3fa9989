"""What one tenant may use of a router: bytes, requests at once, and a share of the local tier."""

import random

import pytest

from cache.tiers.entry import Entry
from cache.tiers.local_tier import LocalTier
from router.admission.caller import Caller, Priority, RefusedError
from router.admission.tenant_limits import CacheShares, Concurrency, TenantLimits
from router.settings import RouterSettings
from tests.unit.router.admission.test_admission import Clock

ACME, OTHER = Caller("acme", Priority.NORMAL), Caller("other", Priority.NORMAL)
CAPACITY = 1 << 20


def test_bytes_of_requests_are_limited_and_a_large_one_leaves_a_debt():
    clock = Clock()
    limits = TenantLimits({"acme": 1000.0}, {}, {}, LocalTier(CAPACITY), clock)
    limits.bytes.take(ACME, 900)
    with pytest.raises(
        RefusedError, match=r"its quota of 1000 bytes of requests a second; retry in 0\.100 s"
    ) as refused:
        limits.bytes.take(ACME, 200)
    assert refused.value.retry_after == pytest.approx(0.1)
    assert refused.value.kind == "bytes"
    limits.bytes.take(OTHER, 10**9)
    clock.now += 1
    limits.bytes.take(ACME, 5000)
    clock.now += 4
    with pytest.raises(RefusedError):
        limits.bytes.take(ACME, 1)
    clock.now += 1
    limits.bytes.take(ACME, 900)
    assert {sample.labels[0]: sample.value for sample in limits.samples()} == {"bytes": 2, "concurrency": 0}


def test_requests_at_once_are_limited_for_each_tenant():
    limits = Concurrency({"acme": 2, "*": 1})
    limits.begin(ACME)
    limits.begin(ACME)
    limits.begin(OTHER)
    for caller, message in ((ACME, "tenant 'acme' has 2 requests under way"), (OTHER, "tenant 'other' has 1 ")):
        with pytest.raises(RefusedError, match=message) as refused:
            limits.begin(caller)
        assert refused.value.retry_after
        assert refused.value.kind == "concurrency"
    limits.end(ACME)
    limits.begin(ACME)
    assert limits.refused == 2
    for caller in (ACME, ACME, OTHER):
        limits.end(caller)
    assert limits._under_way == {}


def test_a_tenant_without_a_limit_has_none():
    limits = Concurrency({"acme": 1})
    for _ in range(1000):
        limits.begin(OTHER)


class Cache:
    """A local tier in which tenants store answers of 1,000 bytes."""

    def __init__(self, **shares):
        self.local = LocalTier(CAPACITY)
        self.shares = CacheShares({name.replace("others", "*"): share for name, share in shares.items()}, self.local)
        self.stored = {}

    def store(self, tenant, number):
        key = b"%15s-%016d" % (tenant.encode(), number)
        self.local.put(key, Entry(bytes(1000), 1000))
        self.shares.keep(tenant, key, 1000)
        self.stored.setdefault(tenant, []).append(key)

    def held(self, tenant):
        return [key for key in self.stored.get(tenant, ()) if self.local.peek(key) is not None]


def test_a_tenant_has_its_share_of_the_local_tier_and_takes_nothing_of_others():
    cache = Cache(acme=0.1, others=0.5)
    for number in range(50):
        cache.store("other", number)
    for number in range(1000):
        cache.store("acme", number)
        assert sum(len(key) + 1000 for key in cache.held("acme")) <= 0.1 * CAPACITY
    assert len(cache.held("acme")) > 60
    # The newest stay.
    assert cache.held("acme") == cache.stored["acme"][-len(cache.held("acme")) :]
    assert len(cache.held("other")) == 50


def test_an_answer_that_is_replaced_is_counted_once():
    cache = Cache(acme=0.1)
    for _ in range(1000):
        cache.store("acme", 1)
    assert cache.shares._bytes["acme"] < 2000
    assert len(cache.held("acme")) == 1000


def test_answers_that_were_evicted_are_forgotten():
    cache, draw = Cache(others=0.5), random.Random(1)
    for number in range(20_000):
        cache.store(f"tenant-{draw.randrange(200)}", number)
    known = sum(map(len, cache.shares._answers.values()))
    assert known < 4 * cache.local.counters.entries
    assert len(cache.shares._to_check) < 8 * cache.local.counters.entries


def test_an_answer_larger_than_the_share_is_not_stored():
    cache = Cache(acme=0.0005)
    cache.store("acme", 1)
    assert cache.held("acme") == []
    assert cache.shares._bytes == {}


def test_the_settings_name_tenants_and_limits(monkeypatch):
    monkeypatch.setenv("RINGMESH_BYTE_QUOTAS", "acme=10MiB, *=1kB")
    monkeypatch.setenv("RINGMESH_CONCURRENCY_QUOTAS", "a=b=4")
    monkeypatch.setenv("RINGMESH_CACHE_QUOTAS", "*=0.25")
    settings = RouterSettings()
    assert settings.byte_quotas == {"acme": 10 << 20, "*": 1000}
    assert settings.concurrency_quotas == {"a=b": 4}
    assert settings.cache_quotas == {"*": 0.25}
    for name, value in (("BYTE", "acme"), ("CONCURRENCY", "acme=0"), ("CACHE", "acme=2"), ("BYTE", "acme=fast")):
        with monkeypatch.context() as wrong:
            wrong.setenv(f"RINGMESH_{name}_QUOTAS", value)
            with pytest.raises(ValueError, match=f"{name.lower()}_quotas"):
                RouterSettings()
