"""What callers say beside a request is read in one place, and what is not clear is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.errors import InvalidArgumentError
from services.runtime.oip.protocol import MAX_TENANT, caller_metadata, check_tenant


def test_tenant_priority_and_cache_control_are_read_whatever_is_between_them():
    sent = (
        ("user-agent", "x"),
        ("ringmesh-tenant", "acme"),
        ("cache-control", "no-store"),
        ("ringmesh-priority", "critical"),
        ("cache-control", "max-age=1"),
    )
    said = caller_metadata(sent)
    assert (said.tenant, said.priority, said.control) == ("acme", "critical", "no-store,max-age=1")
    assert said.error is None


@pytest.mark.parametrize("sent", [(), (("user-agent", "x"), ("ringmesh-tenant", ""), ("ringmesh-priority", ""))])
def test_who_says_nothing_says_nothing(sent):
    said = caller_metadata(sent)
    assert (said.tenant, said.priority, said.control) == ("", "", "")
    assert said.error is None


@pytest.mark.parametrize("name", ["ringmesh-tenant", "ringmesh-priority"])
@pytest.mark.parametrize("values", [("", "acme"), ("acme", ""), ("acme", "acme"), ("", "")])
def test_what_is_given_twice_is_refused(name, values):
    """The memo once took the one and the key the other."""
    error = caller_metadata([(name, value) for value in values]).error
    assert (error.message, error.field) == (f"{name} is given twice", name)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=MAX_TENANT))
def test_any_visible_ascii_text_is_a_tenant_without_spaces_around_it(name):
    said = caller_metadata([("ringmesh-tenant", name)])
    assert said.tenant == name
    assert (said.error is None) == (name == name.strip())


@given(
    st.text(max_size=5),
    st.characters(exclude_categories=("Cs",)).filter(lambda one: not 32 <= ord(one) < 127),
    st.text(max_size=5),
)
def test_control_characters_and_other_alphabets_are_no_part_of_a_tenant(before, wrong, after):
    with pytest.raises(InvalidArgumentError) as refused:
        check_tenant(before + wrong + after, "tenant")
    assert refused.value.field == "tenant"


def test_a_tenant_is_bounded():
    check_tenant("x" * MAX_TENANT, "tenant")
    with pytest.raises(InvalidArgumentError, match="257 characters; at most 256"):
        check_tenant("x" * 257, "tenant")


@pytest.mark.parametrize("name", ["ringmesh-tenant", "ringmesh-priority", "cache-control"])
def test_bytes_are_no_text(name):
    assert caller_metadata([(name, b"acme")]).error.message == f"{name} is text"


def test_of_two_traces_none_is_continued():
    assert caller_metadata([("a", "b"), ("traceparent", "one")]).traceparent == "one"
    assert caller_metadata([("traceparent", "one")] * 2).traceparent is None
    assert caller_metadata([("traceparent", "one")] * 3).traceparent is None
    assert caller_metadata([("traceparent", b"one")]).traceparent is None
    assert caller_metadata([]).traceparent is None
