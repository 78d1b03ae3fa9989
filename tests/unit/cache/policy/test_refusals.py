import pytest

from cache.policy.refusals import Refusals
from services.runtime.errors import InvalidArgumentError
from tests.unit.clock import Clock


def test_a_refusal_is_repeated_until_its_time_is_over():
    clock = Clock()
    refusals = Refusals(5.0, clock)
    refusals.keep(b"key", InvalidArgumentError("too long", field="inputs"))
    with pytest.raises(InvalidArgumentError, match="too long") as caught:
        refusals.check(b"key")
    assert caught.value.field == "inputs"
    refusals.check(b"other")
    clock.now = 5.0
    refusals.check(b"key")


def test_nothing_is_kept_where_that_is_not_configured():
    refusals = Refusals(0.0, Clock())
    refusals.keep(b"key", InvalidArgumentError("too long"))
    refusals.check(b"key")
