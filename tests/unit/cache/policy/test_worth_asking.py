import random

from hypothesis import given
from hypothesis import strategies as st

from cache.policy.worth_asking import CLOSE, EXPLORED, NOT_WORTH, UNKNOWN, WORTH, WorthAsking

MODEL = b"model".ljust(16)
SECONDS = st.floats(1e-6, 10.0)
SHARES = st.floats(0.0, 1.0)
EAGERNESS = {NOT_WORTH: 0, EXPLORED: 0, CLOSE: 1, WORTH: 2}


def keys(seed=0):
    source = random.Random(seed)
    while True:
        yield MODEL + source.randbytes(16)


def learned(share, look_ups=2000):
    """After look-ups with this share of hits."""
    worth, source = WorthAsking(), random.Random(1)
    for _ in range(look_ups):
        worth.learn(MODEL, hit=source.random() < share)
    return worth


@given(SHARES, SECONDS, SECONDS, SECONDS, SECONDS)
def test_what_saves_more_or_costs_less_is_asked_at_least_as_eagerly(share, compute, more, trip, write):
    worth, key = learned(share, 100), next(keys())
    asked = EAGERNESS[worth.decide(MODEL, key, compute, trip, write)]
    assert EAGERNESS[worth.decide(MODEL, key, compute + more, trip, write)] >= asked
    assert EAGERNESS[worth.decide(MODEL, key, compute, trip + more, write)] <= asked
    assert EAGERNESS[worth.decide(MODEL, key, compute, trip, write + more)] <= asked


@given(SHARES, SECONDS, SECONDS, SECONDS)
def test_where_it_is_clear_what_is_faster_that_is_done(share, compute, trip, write):
    worth = learned(share)
    known = worth.share(MODEL)
    assert abs(known - share) < 0.15
    asking_first = trip + (1 - known) * (compute + write)
    decision = worth.decide(MODEL, next(keys()), compute, trip, write)
    if decision is WORTH:
        assert asking_first < compute
    elif decision in (NOT_WORTH, EXPLORED):
        assert asking_first > compute


def test_without_measurements_keys_are_looked_up_first():
    worth, key = WorthAsking(), next(keys())
    assert worth.decide(MODEL, key, None, 0.001) is UNKNOWN
    assert worth.decide(MODEL, key, 0.0015, 0.001) is CLOSE
    assert UNKNOWN.waits
    assert not CLOSE.waits


def test_a_tier_that_was_never_reached_is_not_waited_for():
    assert WorthAsking().decide(MODEL, next(keys()), 10.0, float("inf")) in (NOT_WORTH, EXPLORED)


def test_some_keys_are_asked_for_though_it_is_not_worth_it_and_the_same_by_all_processes():
    one, other = learned(0.0), learned(0.0)
    asked = 0
    for _, key in zip(range(64_000), keys(), strict=False):
        decision = one.decide(MODEL, key, 0.0001, 0.001)
        assert other.decide(MODEL, key, 0.0001, 0.001) is decision
        asked += decision.asks
    assert 800 < asked < 1200


def run(routers, repeated, compute, seed):
    """This share of 20,000 requests were made before, at any router; returns how many were looked up."""
    source, fresh, tier = random.Random(seed), keys(seed), set()
    made, asked = [next(fresh)], 0
    for _ in range(20_000):
        key = source.choice(made) if source.random() < repeated else next(fresh)
        made.append(key)
        worth = source.choice(routers)
        if worth.decide(MODEL, key, compute, 0.0002, 0.00005).asks:
            asked += 1
            worth.learn(MODEL, hit=key in tier)
            tier.add(key)
    return asked


def test_a_fleet_that_has_stopped_asking_begins_again_when_requests_repeat_or_computing_takes_longer():
    routers = [WorthAsking(), WorthAsking()]
    assert run(routers, 0.01, 0.0005, 1) < 1000
    assert run(routers, 0.9, 0.0005, 2) > 10_000  # seen in the explored keys alone
    assert run(routers, 0.01, 0.0005, 3) < 3000
    assert run(routers, 0.01, 0.5, 4) > 19_000


def test_models_are_judged_apart():
    worth = learned(0.0)
    assert not worth.decide(MODEL, MODEL + b"\1\1\1\1", 0.001, 0.001).asks
    assert worth.decide(b"other".ljust(16), MODEL + b"\1\1\1\1", 0.01, 0.001) is WORTH
