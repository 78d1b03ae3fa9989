from cache.policy.doorkeeper import Doorkeeper
from cache.tiers.entry import Entry


class Shared:
    """What was written."""

    def __init__(self):
        self.keys = []

    def put(self, key, entry, kept_ms):
        self.keys.append(key)


def test_only_what_was_asked_for_again_is_written_and_once():
    shared = Shared()
    doorkeeper = Doorkeeper(shared)
    once, twice = Entry(b"a", 1), Entry(b"b", 1)
    doorkeeper.offer(b"once", once)
    doorkeeper.offer(b"twice", twice)
    doorkeeper.look()
    assert shared.keys == []
    twice.hits = 1
    doorkeeper.look()
    doorkeeper.look()
    assert shared.keys == [b"twice"]


def test_what_waits_is_bounded_and_the_oldest_is_forgotten():
    shared = Shared()
    doorkeeper = Doorkeeper(shared)
    entries = [Entry(bytes(1 << 20), 1) for _ in range(70)]
    for index, entry in enumerate(entries):
        doorkeeper.offer(b"%d" % index, entry)
        entry.hits = 1
    doorkeeper.look()
    assert shared.keys == [b"%d" % index for index in range(6, 70)]
