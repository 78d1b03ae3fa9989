import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.policy.cache_control import CacheControl, parse_cache_control
from services.runtime.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("no-store", CacheControl(no_store=True)),
        ("No-Cache , NO-STORE", CacheControl(no_store=True, no_cache=True)),
        ("only-if-cached, max-age=60", CacheControl(only_if_cached=True, max_age_ms=60_000)),
        ("max-age=60,max-age=5", CacheControl(max_age_ms=5_000)),
        ('max-age="7"', CacheControl(max_age_ms=7_000)),
        ("max-age=99999999999999999999", CacheControl(max_age_ms=2**31 * 1000)),
        ("stale-if-error=5, x-own=1,, no-transform", CacheControl()),
        (" , ", CacheControl()),
    ],
)
def test_directives_combine_and_unknown_ones_are_ignored(text, means):
    assert parse_cache_control(text) == means


@pytest.mark.parametrize(
    "text", ["max-age", "max-age=", "max-age=-1", "max-age=1.5", "max-age=²", 'max-age="', "no-store=1"]
)
def test_a_value_that_cannot_be_read_is_refused_by_name(text):
    with pytest.raises(InvalidArgumentError, match=text.partition("=")[0]):
        parse_cache_control(text)


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(InvalidArgumentError):
        parse_cache_control(text)


def test_an_answer_is_taken_up_to_its_age_and_never_where_it_is_to_be_new():
    assert CacheControl().takes(0, 10**9)
    assert [CacheControl(max_age_ms=1000).takes(0, now) for now in (0, 1000, 1001)] == [True, True, False]
    assert not CacheControl(no_cache=True).takes(5, 5)
