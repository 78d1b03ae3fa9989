import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.keys.epochs import EVERYTHING, Epochs, key_scope, model_scope, tenant_scope

DIGEST, HASH = b"d" * 16, b"h" * 16
NAMES = st.sampled_from([EVERYTHING, model_scope("a"), model_scope("b"), tenant_scope("t"), key_scope(DIGEST + HASH)])
SCOPES = st.dictionaries(NAMES, st.integers(1, 50))


def test_without_a_purge_a_key_is_digest_and_hash():
    assert Epochs({}).key(DIGEST, "a", HASH) == DIGEST + HASH


def test_a_purge_changes_the_keys_in_its_scope_and_no_others():
    other = b"o" * 16
    before = Epochs({})
    for scope, changed in (
        (EVERYTHING, {("a", HASH), ("b", HASH), ("a", other)}),
        (model_scope("a"), {("a", HASH), ("a", other)}),
        (key_scope(DIGEST + HASH), {("a", HASH)}),
        (tenant_scope("t"), set()),
    ):
        after = Epochs({scope: 7})
        for name, request in (("a", HASH), ("b", HASH), ("a", other)):
            digest = DIGEST if name == "a" else b"e" * 16
            same = before.key(digest, name, request) == after.key(digest, name, request)
            assert same == ((name, request) not in changed)


@given(SCOPES, SCOPES)
def test_views_that_heard_of_the_same_purges_agree_whatever_the_order(one, two):
    first, second = Epochs(one).merged(two), Epochs(two).merged(one)
    assert first.scopes == second.scopes
    assert first.key(DIGEST, "a", HASH) == second.key(DIGEST, "a", HASH)
    assert first.own_key("a", "t", b"k") == second.own_key("a", "t", b"k")


@given(SCOPES, NAMES)
def test_no_key_comes_back_after_a_purge(scopes, scope):
    before = Epochs(scopes)
    after = before.merged({scope: before.version + 1})
    if scope in (EVERYTHING, model_scope("a"), key_scope(DIGEST + HASH)):
        assert before.key(DIGEST, "a", HASH) != after.key(DIGEST, "a", HASH)
    if scope in (EVERYTHING, model_scope("a"), tenant_scope("t")):
        assert before.own_key("a", "t", b"k") != after.own_key("a", "t", b"k")


def test_a_purge_of_everything_drops_the_smaller_ones_before_it():
    assert dict(Epochs({model_scope("a"): 1, key_scope(DIGEST + HASH): 2}).merged({EVERYTHING: 3}).scopes) == {
        EVERYTHING: 3
    }


def test_data_of_other_services_is_apart_by_namespace_and_tenant():
    epochs = Epochs({})
    keys = {epochs.own_key(*parts) for parts in (("a", "", b"k"), ("", "a", b"k"), ("", "", b"ak"), ("ak", "", b""))}
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("scope", "epoch"),
    [("key:zz", 1), ("key:é", 1), (EVERYTHING, 2**63), (model_scope("a"), -1), (model_scope("a"), 10**30)],
)
def test_what_no_purge_writes_is_ignored(scope, epoch):
    epochs = Epochs({}).merged({scope: epoch, tenant_scope("t"): 5})
    assert dict(epochs.scopes) == {tenant_scope("t"): 5}
    assert len(epochs.key(DIGEST, "a", HASH)) == 32
