"""Compares eviction policies by replaying traces: `python -m tests.bench.eviction`."""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.eviction.policies import POLICIES
from tests.bench.eviction.traces import MADE, from_csv

SHARES = (0.01, 0.05, 0.2)


def replay(policy, keys, sizes, costs):
    """Returns (hits, µs of compute time saved by them, seconds taken)."""
    hits = saved = 0
    start = time.perf_counter()
    for key in keys:
        if policy.get(key):
            hits += 1
            saved += costs[key]
        else:
            policy.put(key, sizes[key], costs[key])
    return hits, saved, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.bench.eviction", description=__doc__)
    parser.add_argument("--requests", type=int, default=300_000, help="in each trace")
    parser.add_argument("--csv", type=Path, action="append", default=[], help="a trace to replay as well")
    arguments = parser.parse_args()
    traces = {name: make(arguments.requests) for name, make in MADE.items()}
    traces |= {path.stem: from_csv(path, arguments.requests) for path in arguments.csv}
    console = Console(width=200)
    table = Table("", *(f"{trace} {share:.0%}" for trace in traces for share in SHARES), "µs a request")
    for name, policy in POLICIES.items():
        cells, seconds, requests = [], 0.0, 0
        for trace in traces.values():
            keys, sizes, costs = (array.tolist() for array in (trace.keys, trace.sizes, trace.costs))
            total = sum(costs[key] for key in keys)
            for share in SHARES:
                hits, saved, took = replay(policy(int(trace.footprint * share)), keys, sizes, costs)
                cells.append(f"{hits / len(keys):.1%}\n{saved / total:.1%}")
                seconds += took
                requests += len(keys)
        table.add_row(name, *cells, f"{seconds / requests * 1e6:.2f}")
    console.print("hit ratio and compute saved, by trace and by cache size as a share of all bytes in the trace")
    console.print(table)


if __name__ == "__main__":
    main()
