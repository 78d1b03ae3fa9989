"""Runs many seeds on a pool of processes."""

import multiprocessing
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor

from tests import installation

_CHUNK = 8
_PROGRESS = 5000


def prepare():
    """Installs virtual time in this process, before any module of Ringmesh is loaded."""
    from tests.simulation import clock

    random.seed(0)
    clock.install()
    installation.choose()
    if mutant := os.environ.get("RINGMESH_SIMULATION_MUTANT"):
        from tests.simulation import mutants

        mutants.apply(mutant)


def _chunk(job):
    first, count, plan = job
    from tests.simulation.run import run as run_seed

    return [run_seed(seed, plan) for seed in range(first, first + count)]


def run(options, tell):
    """Runs the seeds on all cores and calls `tell` with each failed result. Returns 1 if one failed."""
    began = time.perf_counter()
    last = options.first + options.seeds
    # Who searches waits for the seeds that are under way when one has failed.
    chunk = 1 if options.until_found else _CHUNK
    jobs = [(first, min(chunk, last - first), options.plan) for first in range(options.first, last, chunk)]
    failed = seeds = calls = 0
    plans = {}
    # This pool ends with an error if a process does; multiprocessing.Pool starts another one, without end.
    pool = ProcessPoolExecutor(
        options.jobs or len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"), prepare
    )
    with pool:
        for results in pool.map(_chunk, jobs):
            for result in results:
                seeds += 1
                calls += result.calls
                plan = plans.setdefault(result.plan, [0, 0.0])
                plan[0] += 1
                plan[1] += result.seconds
                if options.digests:
                    print(f"seed {result.seed} {result.plan} digest {result.digest}")
                if result.violations:
                    failed += 1
                    tell(result, options.plan)
                if seeds % _PROGRESS == 0:
                    print(f"{seeds} seeds, {failed} failed, {time.perf_counter() - began:.0f} s", flush=True)
            if failed and options.until_found:
                break
        pool.shutdown(cancel_futures=True)
    took = time.perf_counter() - began
    print(f"{seeds} seeds, {calls} requests, {failed} failed, {took:.1f} s, {seeds / took:.1f} seeds/s")
    for name, (count, seconds) in sorted(plans.items()):
        print(f"  {name:16} {count:6} seeds {1000 * seconds / count:7.1f} ms of CPU each")
    return int(failed > 0)
