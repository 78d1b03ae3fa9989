"""The use of the shared tier by measured cost, with a shared tier and a model whose answers a test decides."""

import re
import time

import pytest

from cache.keys.invalidation import InvalidationLog
from cache.mesh import Computed, Mesh
from cache.policy.freshness import Freshness
from cache.policy.leases import Lease, Leases
from cache.policy.refusals import Refusals
from cache.policy.worth_asking import Subject
from cache.regions.peer_regions import PeerRegions
from cache.tiers.entry import Entry
from cache.tiers.local_tier import LocalTier
from services.runtime.driver import Driver, Promise
from services.runtime.errors import InvalidArgumentError, RingmeshError, UnavailableError
from services.runtime.telemetry.tracing import untraced
from tests.unit.clock import Clock

DIGEST = b"d" * 16
TRIP = 0.001


class Shared:
    """A shared tier; with `gate`, look-ups wait for it. `seconds` is what a look-up takes on the test's clock."""

    ttl_ms = 1000

    def __init__(self, clock):
        self.clock = clock
        self.held, self.looked_up, self.written = {}, [], []
        self.seconds, self.gate, self.fails = TRIP, None, False

    async def get_answer(self, key, on_reply=None):
        self.looked_up.append(key)
        self.clock.now += self.seconds
        if self.gate is not None:
            await self.gate
        entry = self.held.get(key)
        if on_reply is not None and not self.fails:
            on_reply(entry is not None)
        return None if self.fails else entry

    def put(self, key, entry, kept_ms):
        self.written.append(key)
        self.held[key] = entry


class Router:
    """A mesh and a model that takes `seconds`. `policy` is the model's."""

    def __init__(self, monkeypatch, policy="", shared=None):
        self.clock = Clock(1000.0)
        monkeypatch.setattr(time, "monotonic", self.clock)
        purges = InvalidationLog(None, "test", 1.0)
        self.mesh = Mesh(LocalTier(1 << 20), None, purges, PeerRegions([], purges), Refusals(60))
        self.mesh.shared = self.shared = shared or Shared(self.clock)
        self.subject = Subject("m", DIGEST, 100, policy)
        self.seconds = 0.01
        self.computing, self.cancelled = [], 0
        self.number = 0

    async def _compute(self, key):
        promise = Promise()
        self.computing.append(promise)
        try:
            await promise
        except BaseException as error:
            self.cancelled += not isinstance(error, RingmeshError)
            raise
        return Computed(Entry(b"computed", 1), key, "w", seconds=self.seconds)

    def ask(self, key, freshness=None):
        """The outcomes of a request: none until it is answered."""
        outcomes = []

        async def request():
            flight, _ = self.mesh.get_or_compute(key, lambda: self._compute(key), untraced(), self.subject, freshness)
            return await flight

        Driver(request(), outcomes.append).start()
        return outcomes

    def key(self, *, explored=False):
        self.number += 1
        return DIGEST + self.number.to_bytes(12, "big") + (0 if explored else 1).to_bytes(4, "big")

    def compute(self, count, **kind):
        """Answers this many new requests, by computing unless the shared tier has them."""
        for _ in range(count):
            outcomes = self.ask(self.key(**kind))
            if self.computing:
                self.computing.pop().settle(None)
            (found,) = outcomes
        return found

    def learn(self, seconds, *, share=0.0, look_ups=2000):
        """Sets what was measured: the compute time and the hit ratio."""
        self.seconds = seconds
        for _ in range(40):
            self.mesh.learn(self.subject, seconds)
        for number in range(look_ups):
            hit = int((number + 1) * share) > int(number * share)
            self.mesh.shared_use.looked_up(self.subject, TRIP, hit=hit)

    def decisions(self):
        return {sample.labels[1]: sample.value for sample in self.mesh.shared_use.samples()}


@pytest.fixture
def router(monkeypatch):
    return Router(monkeypatch)


async def test_before_anything_is_measured_a_request_is_looked_up_first_and_written(router):
    key = router.key()
    router.shared.gate = Promise()
    outcomes = router.ask(key)
    assert router.computing == []
    router.shared.gate.settle(None)
    router.computing.pop().settle(None)
    (found,) = outcomes
    assert (found.outcome, router.shared.written) == ("miss", [key])
    assert "not known yet" in found.reason


async def test_a_cheap_model_soon_leaves_the_shared_tier_alone_except_for_a_few_keys(router):
    router.seconds = 0.0005
    router.compute(200)
    looked_up, written = len(router.shared.looked_up), len(router.shared.written)
    assert looked_up < 100
    assert router.compute(1000).reason.startswith("not looked up")
    assert (len(router.shared.looked_up), len(router.shared.written)) == (looked_up, written)
    router.compute(10, explored=True)
    assert (len(router.shared.looked_up), len(router.shared.written)) == (looked_up + 10, written + 10)
    assert router.decisions()["explored"] == 10
    assert router.decisions()["skipped"] >= 1000


async def test_answers_of_an_expensive_model_are_written_even_if_no_look_up_was_ever_a_hit(router):
    router.seconds = 1.0
    router.compute(3000)
    assert len(router.shared.written) == 3000


async def test_a_model_that_becomes_slower_uses_the_shared_tier_again(router):
    router.learn(0.0005)
    assert router.compute(1).reason.startswith("not looked up")
    router.seconds = 1.0
    router.compute(3)
    assert router.compute(1).reason.startswith("looked up first")


async def test_hits_of_explored_keys_bring_the_look_ups_back(router):
    router.learn(0.01)
    assert router.compute(1).reason.startswith("not looked up")
    for _ in range(100):
        key = router.key(explored=True)
        router.shared.held[key] = Entry(b"held", 1)
        (found,) = router.ask(key)
        assert found.outcome == "hit-shared"
    assert router.compute(1).reason.startswith("looked up first")


async def test_a_redis_that_becomes_slow_is_used_less(router):
    router.learn(0.01, share=0.5)
    assert router.compute(1).reason.startswith("looked up first")
    router.shared.seconds = 1.0
    router.compute(20)
    assert router.compute(1).reason.startswith("not looked up")


async def test_look_ups_that_redis_does_not_answer_say_nothing_about_its_hits(router):
    router.learn(0.01, share=0.5)
    router.shared.fails, router.shared.seconds = True, 1.0
    router.compute(100)
    assert router.compute(1).reason.startswith("looked up first")


def concurrent(router):
    """A request that is looked up while it is computed; `gate` answers the look-up."""
    router.learn(0.002, share=0.5)
    router.shared.gate = Promise()
    key = router.key()
    outcomes = router.ask(key)
    assert (outcomes, router.shared.looked_up, len(router.computing)) == ([], [key], 1)
    return key, outcomes


async def test_if_saving_and_cost_are_close_a_hit_answers_and_ends_the_computation(router):
    key, outcomes = concurrent(router)
    router.shared.held[key] = held = Entry(b"held", 1)
    router.shared.gate.settle(None)
    (found,) = outcomes
    assert (found.outcome, found.entry.value, router.cancelled) == ("hit-shared", b"held", 1)
    assert found.reason.startswith("looked up while computing")
    assert router.mesh.local.peek(key) is held
    assert not router.mesh.flights
    assert not router.mesh._leaders


async def test_if_saving_and_cost_are_close_a_computed_answer_does_not_wait_for_the_look_up(router):
    key, outcomes = concurrent(router)
    router.shared.held[key] = Entry(b"held", 1, 5)
    router.computing.pop().settle(None)
    (found,) = outcomes
    assert (found.outcome, router.shared.written) == ("miss", [key])
    router.shared.held[key] = Entry(b"held", 1, 5)
    share = router.mesh.shared_use._worth.share(router.subject.id)
    router.shared.gate.settle(None)
    assert router.mesh.local.peek(key) is found.entry  # it is younger
    assert router.mesh.shared_use._worth.share(router.subject.id) > share


async def test_equal_requests_join_whatever_is_looked_up_and_computed_for_the_first(router):
    key, outcomes = concurrent(router)
    second = router.ask(key)
    assert (len(router.shared.looked_up), len(router.computing)) == (1, 1)
    router.computing.pop().settle(None)
    assert outcomes == second
    assert [found.entry.value for found in outcomes] == [b"computed"]


async def test_if_computing_fails_the_look_up_may_still_answer(router):
    key, outcomes = concurrent(router)
    router.shared.held[key] = Entry(b"held", 1)
    router.computing.pop().fail(UnavailableError("no worker"))
    assert outcomes == []
    router.shared.gate.settle(None)
    assert [found.outcome for found in outcomes] == ["hit-shared"]


async def test_if_computing_fails_and_the_look_up_misses_the_error_is_the_result_and_is_remembered(router):
    key, outcomes = concurrent(router)
    router.computing.pop().fail(InvalidArgumentError("x has the wrong values"))
    router.shared.gate.settle(None)
    assert [type(error) for error in outcomes] == [InvalidArgumentError]
    with pytest.raises(InvalidArgumentError):
        router.mesh.peek(key)


async def test_an_answer_from_before_a_purge_ends_no_computation(router):
    key, outcomes = concurrent(router)
    router.shared.held[key] = Entry(b"held", 1, 5)
    router.mesh.purges._contact = -60.0
    router.shared.gate.settle(None)
    assert (outcomes, router.cancelled) == ([], 0)
    router.computing.pop().settle(None)
    assert [found.outcome for found in outcomes] == ["miss"]


async def test_an_expired_answer_ends_no_computation(router):
    router.learn(0.002, share=0.5)
    router.shared.gate = Promise()
    key = router.key()
    outcomes = router.ask(key, Freshness(1000))
    router.shared.held[key] = Entry(b"held", 1, 5)
    router.shared.gate.settle(None)
    assert (outcomes, router.cancelled) == ([], 0)
    router.computing.pop().settle(None)
    assert [found.outcome for found in outcomes] == ["miss"]


async def test_a_router_that_stops_ends_the_computation_beside_a_look_up(router):
    _, outcomes = concurrent(router)
    router.mesh.flights.close()
    assert [type(error) for error in outcomes] == [UnavailableError]
    assert router.cancelled == 1
    router.shared.gate.settle(None)
    assert not router.mesh._leaders


@pytest.mark.parametrize("policy", ["always", "never"])
async def test_the_configuration_of_a_model_decides_before_any_measurement(monkeypatch, policy):
    router = Router(monkeypatch, policy)
    router.learn(0.0001 if policy == "always" else 10.0, share=0.0 if policy == "always" else 1.0)
    found = router.compute(10)
    assert (len(router.shared.looked_up), len(router.shared.written)) == ((10, 10) if policy == "always" else (0, 0))
    assert found.reason.endswith("the model's configuration says so")
    assert router.mesh.explain(router.key(), router.subject).startswith(found.reason)


async def test_an_explanation_has_what_was_measured_and_counts_nothing(router):
    router.learn(0.004, share=0.25)
    told = router.mesh.explain(router.key(), router.subject)
    assert re.fullmatch(
        "looked up while computing: .*; recently computing took 4 ms, a look-up 1 ms, a write 0 ms, "
        "and the hit ratio counts as 25%",
        told,
    )
    assert router.decisions() == {}


async def test_requests_of_different_sizes_are_decided_apart(router):
    router.learn(0.0001)
    large = Subject("m", DIGEST, 1 << 20)
    assert not router.mesh.decide(router.key(), router.subject).asks
    assert router.mesh.decide(router.key(), large).waits


class HeldLeases(Leases):
    """A lease that is always granted, and whose release waits for `gate`."""

    def __init__(self):
        super().__init__(None)
        self.gate = Promise()

    async def take(self, name, milliseconds):
        return Lease(1, milliseconds)

    async def release(self, name, token):
        await self.gate


async def test_a_renewal_that_fails_raises_its_own_error_whatever_is_handled_when_it_goes_on(router):
    async def compute():
        raise UnavailableError("no worker")

    router.mesh._leases = leases = HeldLeases()
    renewal = router.mesh._renew(router.key(), Entry(b"old", 1), compute, router.subject)
    renewal.send(None)
    leases.gate.settle(None)
    try:
        raise OSError
    except OSError:
        with pytest.raises(UnavailableError, match="no worker"):
            renewal.send(None)
