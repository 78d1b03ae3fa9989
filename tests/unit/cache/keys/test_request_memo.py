"""What is remembered of requests by their bytes."""

from cache.keys.request_memo import RequestMemo


def test_the_last_requests_are_remembered_and_never_more_than_twice_the_size():
    memo = RequestMemo[int](10)
    for number in range(100):
        memo.put(memo.digest(b"%d" % number, ""), number)
    known = [number for number in range(100) if memo.get(memo.digest(b"%d" % number, "")) is not None]
    assert set(range(90, 100)) <= set(known)
    assert len(known) <= 20


def test_what_is_asked_for_again_and_again_stays():
    memo = RequestMemo[int](10)
    often = memo.digest(b"often", "")
    memo.put(often, 1)
    for number in range(100):
        memo.put(memo.digest(b"%d" % number, ""), number)
        assert memo.get(often) == 1


def test_the_same_bytes_of_two_tenants_are_two_requests():
    memo = RequestMemo[str](10)
    memo.put(memo.digest(b"same", "red"), "red's")
    assert memo.get(memo.digest(b"same", "blue")) is None
    assert memo.get(memo.digest(b"same", "")) is None
