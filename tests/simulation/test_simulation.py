"""The simulated fleet keeps its invariants, and the simulation finds known faults.

Each run has processes of its own, because virtual time replaces the clocks of a whole process.
"""

import os
import re
import subprocess
import sys

import pytest

from tests import installation
from tests.simulation.mutants import MUTANTS, PLANS

_ON_SOURCES = pytest.mark.skipif(
    bool(os.environ.get("RINGMESH_TEST_COMPILED")),
    reason="a fault is put back by an edit of sources as they are imported",
)


def simulate(*arguments, **environment):
    command = [sys.executable, "-W", "ignore", "-m", "tests.simulation", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)


def test_500_seeds_keep_every_invariant():
    # Of what services run; the tests below run the sources.
    modules = {"RINGMESH_TEST_COMPILED": "1"} if installation.is_compiled() else {}
    done = simulate("--seeds", 500, **modules)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("plan", ["", "exceptions"])
def test_a_seed_is_the_same_whatever_ran_before_it(plan):
    arguments = ("--jobs", 1, "--digests", "--plan", plan)
    long, short = (simulate("--first", first, "--seeds", 40 - first, *arguments) for first in (0, 28))
    told = [dict(re.findall(r"^seed (\d+) .* digest (\w+)$", done.stdout, re.MULTILINE)) for done in (long, short)]
    assert len(told[1]) == 12, short.stdout + short.stderr
    assert told[1].items() <= told[0].items()


@pytest.mark.proof
@_ON_SOURCES
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_fault_that_is_put_back_is_found(mutant):
    search = ("--seeds", 1000, "--until-found", "--plan", PLANS[mutant])
    done = simulate(*search, RINGMESH_SIMULATION_MUTANT=mutant)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-4000:]
    assert "replay: python -m tests.simulation --seed" in done.stdout, done.stderr[-4000:]
