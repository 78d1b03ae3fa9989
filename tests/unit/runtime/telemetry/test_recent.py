from hypothesis import given
from hypothesis import strategies as st

from services.runtime.telemetry.recent import Recent

CALLS = st.lists(st.tuples(st.sampled_from(["put", "get", "pop"]), st.integers(0, 12)))


@given(st.integers(1, 5), CALLS)
def test_it_is_bounded_answers_what_was_put_last_and_counts_what_it_forgot(size, calls):
    recent, last, put = Recent(size), {}, 0
    for number, (call, key) in enumerate(calls):
        if call == "put":
            put += recent.get(key) is None
            last[key] = number
            recent.put(key, number)
        elif call == "get":
            assert recent.get(key) in (None, last.get(key))
        else:
            found = recent.pop(key)
            assert found in (None, last.pop(key, None))
            put -= found is not None
        assert len(recent) <= 2 * size
        assert recent.dropped == put - len(recent)


@given(st.integers(1, 5), CALLS)
def test_the_last_keys_that_were_used_are_known(size, calls):
    recent, used = Recent(size), []
    for call, key in calls:
        if call == "pop":
            recent.pop(key)
        elif call == "put" or recent.get(key) is not None:
            recent.put(key, key)
        # An entry that is removed leaves its place: older ones may have been evicted for it.
        if call == "pop":
            used = [None if other == key else other for other in used]
        elif recent.get(key) is not None:
            used = [*(other for other in used if other != key), key]
        assert used[-1:] in ([], [None]) or recent.get(used[-1]) is not None
    assert [key for key in used[-size:] if key is not None and recent.get(key) is None] == []
