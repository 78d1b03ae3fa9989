from cache.api.items import Item


def item(compute_ms=100, fresh_until_ms=10_000):
    return Item(b"", compute_ms * 1000, 0, fresh_until_ms)


def test_an_item_without_an_end_is_never_due():
    forever = item(fresh_until_ms=0)
    assert not forever.is_stale(1e15)
    assert not forever.is_due(1e15, 0.0)


def test_xfetch_renews_early_with_the_probability_of_its_paper():
    # P(early) with t left is exp(-t / delta): 37 % where as much is left as computing takes.
    chances = [(index + 0.5) / 10_000 for index in range(10_000)]
    for left_ms, expected in ((100, 0.368), (200, 0.135), (0, 1.0)):
        share = sum(item().is_due(10_000 - left_ms, chance) for chance in chances) / len(chances)
        assert abs(share - expected) < 0.001


def test_what_takes_longer_to_compute_is_renewed_earlier():
    assert item(compute_ms=1000).is_due(9_000, 0.3)
    assert not item(compute_ms=10).is_due(9_000, 0.3)
