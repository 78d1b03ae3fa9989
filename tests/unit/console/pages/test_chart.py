"""Charts: what they say at each step, and numbers as text."""

import html
import json
import math
import re

import numpy as np
import pytest

from services.console.data import units
from services.console.pages.chart import plot

EDGES = np.array([1000.0, 1010.0, 1020.0, 1030.0])


def test_a_chart_has_the_values_of_each_step_for_the_pointer():
    svg = plot("Requests/s", EDGES, {"all": np.array([1.0, math.nan, 3.0]), "failed": None}, units.number)
    steps = json.loads(html.unescape(re.search('data-steps="(.*?)"', svg)[1]))
    assert steps["labels"] == ["all", "failed"]
    assert steps["values"] == [["1", units.UNKNOWN], [units.UNKNOWN, units.UNKNOWN], ["3", units.UNKNOWN]]
    assert steps["times"][0] == units.clock(1010 * 10**9)
    assert f"all: now 3, highest 3; failed: now {units.UNKNOWN}, highest {units.UNKNOWN}" in svg


def test_a_chart_without_values_says_so():
    svg = plot("Requests/s", EDGES, {"all": None}, units.number)
    assert "no data yet" in svg
    assert 'data-steps=""' in svg


def test_a_curve_is_interrupted_where_values_are_missing():
    svg = plot("a", EDGES, {"x": np.array([1.0, math.nan, 3.0])}, units.number)
    assert svg.count('class="line k0"') == 2


@pytest.mark.parametrize(
    ("unit", "highest", "top"),
    [
        (units.size, 160 << 20, "200 MiB"),
        (units.size, 900, "1000 B"),
        (units.size, 0, "1 B"),
        (units.number, 160, "200"),
    ],
)
def test_a_scale_ends_at_a_round_number_of_its_unit(unit, highest, top):
    svg = plot("a", EDGES, {"x": np.array([0.0, 0.0, highest])}, unit)
    assert f'<span class="top">{top}</span>' in svg


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3.6e-09, "3.6e-09"),
        (360 / 1e6 * 1e-5, "3.6e-09"),
        (0.1 + 0.2, "0.3"),
        (7, "7"),
        ("", units.UNKNOWN),
        (True, "True"),
    ],
)
def test_attributes_show_floats_without_their_binary_expansion(value, words):
    assert units.attribute(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0 µs"), (4.2e-4, "420 µs"), (1.234e-3, "1.23 ms"), (4.5, "4.5 s"), (119, "119 s"), (720, "12 min"),
     (9000, "2.5 h"), (-0.003, "-3 ms"), (math.nan, units.UNKNOWN)],
)  # fmt: skip
def test_durations_have_a_suitable_unit(value, words):
    assert units.seconds(value) == words


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0 B"), (1000, "1000 B"), (1536, "1.5 KiB"), (5 << 40, "5120 GiB"), (None, units.UNKNOWN)]
)
def test_sizes_have_a_suitable_unit(value, words):
    assert units.size(value) == words
