"""When the shared tier is used, apart from what the mesh does with the decision (test_mesh.py)."""

import pytest

from cache.policy.shared_use import SharedUse
from cache.policy.worth_asking import Subject


@pytest.mark.parametrize(
    ("has_peers", "policy", "use"), [(False, "", "skipped"), (True, "", "first"), (True, "never", "skipped")]
)
def test_a_cheap_model_uses_the_shared_tier_only_for_peer_regions(has_peers, policy, use):
    shared_use = SharedUse(has_peers=has_peers)
    subject = Subject("cheap", b"d" * 16, 100, policy)
    for _ in range(100):
        shared_use.looked_up(subject, 0.001, hit=False)
    assert shared_use.decide(subject, b"k" * 31 + b"1", 0.0001).use == use
