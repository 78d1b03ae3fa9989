"""The arithmetic of `make bench`: ratios round by round, their spread, and what is concluded from them."""

import dataclasses

import numpy as np
import pytest

from tests.bench import cores, gpu, report, results
from tests.bench.harness import Measured
from tests.bench.results import Figure, Results, Spread, differences, figures
from tests.bench.workloads import WORKLOADS

HIT, MISS = WORKLOADS[:2]
NOTHING = Measured(0, 0, {}, 0, 0, 0, 0, 0, 0, 0, 0)


def found(*rows):
    """Results of (workload, outstanding, peer, rates by round)."""
    made = Results()
    for workload, outstanding, peer, rates in rows:
        runs = [dataclasses.replace(NOTHING, rps=rate, p50=1e3 / rate, p99=3e3 / rate, cpu_us=10.0) for rate in rates]
        made.row(workload, outstanding, peer).runs.extend(runs)
    return made


def compared(ratios):
    """The difference between two trees whose rates have these ratios."""
    rates = [1000 * (1 + 0.5 * (turn % 3)) for turn in range(len(ratios))]
    ours = [rate * ratio for rate, ratio in zip(rates, ratios, strict=True)]
    (difference,) = differences(found((HIT, 16, results.THIS, ours), (HIT, 16, results.OTHER, rates)))
    return difference


def test_ratios_are_taken_within_a_round_so_that_a_slow_round_slows_both():
    made = found((HIT, 16, results.UP, [200, 20, 180]), (HIT, 16, results.TRITON, [100, 10, 100]))
    assert made.ratios("rps", "hit", 16, results.UP, results.TRITON) == [2.0, 2.0, 1.8]


def test_without_one_of_two_peers_there_are_no_ratios():
    assert found((HIT, 16, results.UP, [1])).ratios("rps", "hit", 16, results.UP, results.TRITON) == []


def test_a_spread_is_written_as_median_and_bounds():
    assert str(Spread.of([1.5, 1.0, 2.25])) == "1.50 (1.00-2.25)"


def test_the_interval_of_a_median_holds_it_and_narrows_with_more_rounds():
    draw = np.random.default_rng(2)
    few, many = (Spread.bootstrap(draw.normal(1, 0.1, count)) for count in (9, 400))
    assert few.low < few.median < few.high
    assert many.high - many.low < (few.high - few.low) / 2


def test_the_interval_misses_the_true_median_about_as_rarely_as_it_says():
    draw = np.random.default_rng(3)
    intervals = [Spread.bootstrap(draw.normal(1, 0.1, 16)) for _ in range(60)]
    missed = sum(not interval.low <= 1 <= interval.high for interval in intervals)
    assert missed <= 3  # of 60, where 99 % are promised of large samples


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.1, 1.12, 1.09, 1.11] * 4, "better"),
        ([0.9, 0.92, 0.89, 0.91] * 4, "worse"),
        ([0.9, 1.1, 0.95, 1.06] * 4, "same"),  # the spread holds 1
        ([0.985, 0.99, 0.987, 0.986] * 4, "same"),  # certain, but too small to matter
        ([0.5] * 7, "too few rounds"),
        ([0.5] * 8, "worse"),
    ],
)
def test_two_trees_differ_where_the_interval_leaves_no_doubt_and_the_difference_matters(ratios, verdict):
    assert compared(ratios).verdict == verdict


def test_two_trees_of_the_same_speed_are_rarely_told_apart():
    draw = np.random.default_rng(4)
    verdicts = [compared(draw.normal(1, 0.05, 16)).verdict for _ in range(60)]
    assert verdicts.count("same") >= 58


def test_a_difference_names_the_load_the_rounds_and_the_cpu():
    difference = compared([2.0] * 9)
    assert (difference.workload, difference.outstanding, difference.rounds) == ("hit", 16, 9)
    assert (difference.rps.median, difference.cpu.median) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("ratio", "goal", "at_most", "verdict"),
    [
        (2.0, 2.5, False, "reached"),
        (2.5, 2.5, False, "goal reached"),
        (1.7, 2.5, False, "missed"),
        (1.9, None, True, "missed"),
        (1.8, None, True, "reached"),
    ],
)
def test_a_target_is_judged_by_the_median(ratio, goal, at_most, verdict):
    assert Figure("any", Spread(ratio, 0, 9), 1.8, goal, at_most).verdict == verdict


def test_every_row_beside_triton_has_a_target_and_latencies_are_to_be_lower():
    rows = [(HIT, level, peer, rates) for level in (1, 16, 1024) for peer, rates in
            ((results.UP, [300, 300]), (results.BARE, [400, 400]), (results.TRITON, [100, 200]))]  # fmt: skip
    told = {figure.name: figure for figure in figures(found(*rows))}
    assert told["hit, 16 outstanding: requests/s by Triton's"].ratio == Spread(2.25, 1.5, 3.0)
    assert told["hit, 1,024 outstanding: requests/s by Triton's"].required == 1.0
    alone = told["hit, 1 outstanding: median latency by Triton's"]
    assert (alone.at_most, alone.ratio.high) == (True, pytest.approx(2 / 3))
    assert len(told) == 3


def test_executions_for_each_key_are_a_target():
    made = Results()
    zipf = next(workload for workload in WORKLOADS if workload.kind == "zipf")
    made.row(zipf, 16, results.UP).executions.extend([1.0, 1.001, 1.02])
    (figure,) = figures(made)
    assert (figure.ratio.median, figure.verdict) == (1.001, "reached")


@pytest.mark.parametrize(("here", "measured"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_cores_are_doubled_up_to_all_of_the_machine(here, measured):
    assert cores.doubling(here) == measured


def test_a_call_pays_for_what_the_gpu_takes_above_idling():
    assert gpu.joules_a_call(700.0, 5.0, 100.0, 400) == 0.5
    assert gpu.joules_a_call(499.0, 5.0, 100.0, 400) == 0.0
    assert gpu.joules_a_call(499.0, 5.0, 0.0, 0) == 499.0


def test_a_hit_saves_the_energy_of_a_miss(tmp_path):
    class Counter:
        """A miss run takes 40 J, a hit run 10 J."""

        idle_watts = 0.0
        told = iter((100.0, 140.0, 140.0, 150.0))

        def joules(self):
            return next(self.told)

    class Answering:
        def measure(self, workload, bodies, outstanding, seconds):
            return dataclasses.replace(NOTHING, calls={"miss": 1_000, "hit": 10_000}[workload.kind])

    told = gpu.saved_by_a_hit(Counter(), Answering(), MISS.model, tmp_path, 1)
    assert told.endswith("40.00 mJ a miss, 1.00 mJ a hit; a hit saves 39.00 mJ of the GPU")


def test_the_page_has_each_row_the_targets_and_plots_of_this_run_alone(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bench-old.svg").touch()
    made = found((HIT, 16, results.UP, [300, 300]), (HIT, 16, results.TRITON, [100, 200]))
    report.write(tmp_path, "a machine", "2 rounds", made, figures(made))
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| ringmesh up | 16 | 300 | 300-300 | 2.25 (1.50-3.00) |" in page
    assert "| hit, 16 outstanding: requests/s by Triton's | 2.25 (1.50-3.00) | at least 1.8 | 2.5 | reached |" in page
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["bench-hit.svg"]
