from cache.tiers.entry import Entry
from cache.tiers.evictions import OTHER, Evictions
from cache.tiers.local_tier import LocalTier


def fill(tier, model, count):
    for index in range(count):
        tier.put(model * 16 + b"%016d" % index, Entry(bytes(600), 1000))


def test_evictions_are_counted_by_model_also_of_a_model_whose_keys_have_changed():
    tier = LocalTier(100_000)
    models = {b"a" * 16: "first"}
    evictions = Evictions(tier, lambda: models)
    fill(tier, b"a", 400)
    first = evictions.by_model()["first"]
    assert first == tier.counters.evictions > 200
    models.clear()
    models[b"b" * 16] = "first"
    fill(tier, b"b", 300)
    fill(tier, b"c", 300)
    counts = evictions.by_model()
    assert sum(counts.values()) == tier.counters.evictions
    assert set(counts) == {"first", OTHER}
    assert counts["first"] > first


def test_very_many_models_are_counted_together():
    tier = LocalTier(1_000_000)
    evictions = Evictions(tier, lambda: {b"%016d" % index: f"m{index}" for index in range(5000)})
    for index in range(8000):
        tier.put(b"%016d" % (index % 5000) + b"%016d" % index, Entry(bytes(600), 1000))
    counts = evictions.by_model()
    assert sum(counts.values()) == tier.counters.evictions
    assert len(counts) <= 201
    assert counts[OTHER] > 0
