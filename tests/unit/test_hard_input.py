"""Whatever bytes come from outside, each reader returns or says what is wrong, in time that grows with their number.

`python -m tests.fuzz` looks for inputs that break this, guided by coverage; here those that it found are tried again.
"""

import logging
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import corpus
from tests.fuzz.readers import TARGETS

GROWN_BYTES = 1 << 16


@pytest.fixture(autouse=True, scope="module")
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_inputs_that_were_kept_are_read_or_refused(target):
    for data in (b"", *target.seeds, *corpus.load(target.name)):
        target.run(data)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_long_input_takes_time_in_proportion(target):
    for data in target.seeds:
        if data:
            target.run((data * (GROWN_BYTES // len(data) + 1))[:GROWN_BYTES])


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_inputs_that_are_cut_joined_and_changed_are_read_or_refused(target):
    known = [data for data in (*target.seeds, *corpus.load(target.name)) if data]

    @settings(max_examples=25)
    @given(st.randoms(use_true_random=False))
    def check(chance: random.Random) -> None:
        data = bytearray(chance.choice(known)[: chance.randrange(1, 400)] + chance.choice(known)[:200])
        for _ in range(chance.randrange(4)):
            place = chance.randrange(len(data))
            data[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
            data = data or bytearray(b"\0")
        target.run(bytes(data))

    check()


@settings(max_examples=50)
@given(st.binary(max_size=200), st.sampled_from(list(TARGETS)))
def test_any_bytes_are_read_or_refused(data, name):
    TARGETS[name].run(data)


def test_the_corpus_is_small_and_of_targets_that_there_are():
    files = list(corpus.FOLDER.glob("*.txt"))
    assert {file.stem for file in files} <= TARGETS.keys()
    assert sum(file.stat().st_size for file in files) < 300_000
