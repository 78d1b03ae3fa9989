from router.balancing.member import Listing
from router.membership.membership import LINGER_SECONDS, Membership
from tests.unit.clock import Clock

A, B = Listing("a:1"), Listing("b:1", weight=2.0)


def never(_):
    return False


def always(_):
    return True


def test_members_are_what_any_source_lists():
    membership = Membership(Clock())
    membership.report("settings", [A])
    membership.report("dns", [A, B])
    assert membership.members(never) == {"a:1": A, "b:1": B}


def test_who_is_delisted_and_does_not_answer_leaves_at_once():
    membership = Membership(Clock())
    membership.report("redis", [A, B])
    membership.members(always)
    membership.report("redis", [B])
    assert set(membership.members(never)) == {"b:1"}


def test_who_is_delisted_and_answers_stays_until_it_has_lingered():
    clock = Clock()
    membership = Membership(clock)
    membership.report("redis", [A])
    membership.members(always)
    membership.report("redis", [])
    assert set(membership.members(always)) == {"a:1"}
    clock.now += LINGER_SECONDS - 0.1
    assert set(membership.members(always)) == {"a:1"}
    clock.now += 0.1
    assert set(membership.members(always)) == set()


def test_a_source_that_remembers_again_starts_the_lingering_anew():
    clock = Clock()
    membership = Membership(clock)
    for _ in range(3):
        membership.report("redis", [A])
        membership.members(always)
        membership.report("redis", [])
        membership.members(always)
        clock.now += LINGER_SECONDS - 0.1
    assert set(membership.members(always)) == {"a:1"}


def test_what_a_source_says_anew_counts():
    membership = Membership(Clock())
    membership.report("redis", [A])
    membership.members(always)
    heavier = Listing("a:1", weight=5.0)
    membership.report("redis", [heavier])
    assert membership.members(always) == {"a:1": heavier}
