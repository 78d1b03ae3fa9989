"""Compares key ownership by the slot table, a classic ring and Maglev, and the cost of bounded loads with each.

    python -m tests.bench.ring

Balance and disruption are exact for the keys drawn. Times are CPU times, the lowest of five.
"""

from __future__ import annotations

import bisect
import os
import platform
import random
import sys
import time

import numpy as np
from blake3 import blake3
from rich.console import Console
from rich.table import Table

from router.balancing.pool import BALANCE
from router.balancing.ring import SLOTS, Ring

KEYS = 400_000
SIZES = (3, 30, 300)
VNODES = 160
MAGLEV = 65_537
console = Console(width=150)


class SlotTable:
    name = "slot table (ours)"

    def __init__(self, members):
        self._ring = Ring(dict.fromkeys(members, 1.0))
        self.bytes = self._ring._table.nbytes
        self._names = np.array(self._ring.members)

    def owner(self, key):
        return self._ring.ranked(key)[0]

    def owners(self, keys):
        slots = keys[:, 0].astype(np.uint32) << 8 | keys[:, 1]
        return self._names[self._ring._table[slots, 0]]

    def order(self, key):
        return self._ring.order(key)


class ClassicRing:
    """Karger et al. 1997, with VNODES points a member; the member of the next point owns a key."""

    name = f"ring, {VNODES} points each"

    def __init__(self, members):
        points = sorted(
            (int.from_bytes(blake3(f"{member}#{point}".encode()).digest(8), "big"), member)
            for member in members
            for point in range(VNODES)
        )
        self._points = [point for point, _ in points]
        self._members = [member for _, member in points]
        self.bytes = len(points) * (8 + 8 + sys.getsizeof(1 << 62))
        self._array = np.array(self._points, np.uint64)
        self._names = np.array(self._members)

    def owner(self, key):
        return self._members[bisect.bisect(self._points, int.from_bytes(key[:8], "big")) % len(self._members)]

    def owners(self, keys):
        hashes = np.ascontiguousarray(keys[:, :8]).view(">u8").ravel().astype(np.uint64)
        return self._names[np.searchsorted(self._array, hashes, side="right") % len(self._names)]

    def order(self, key):
        first = bisect.bisect(self._points, int.from_bytes(key[:8], "big"))
        return tuple(dict.fromkeys(self._members[first:] + self._members[:first]))


class Maglev:
    """Eisenbud et al. 2016, with a table of MAGLEV entries."""

    name = f"Maglev {MAGLEV:,}"

    def __init__(self, members):
        members = sorted(members)
        offsets, skips = [], []
        for member in members:
            digest = blake3(member.encode()).digest(16)
            offsets.append(int.from_bytes(digest[:8], "big") % MAGLEV)
            skips.append(int.from_bytes(digest[8:], "big") % (MAGLEV - 1) + 1)
        table = [-1] * MAGLEV
        filled = 0
        while filled < MAGLEV:
            for index, skip in enumerate(skips):
                slot = offsets[index]
                while table[slot] >= 0:
                    slot = (slot + skip) % MAGLEV
                table[slot] = index
                offsets[index] = (slot + skip) % MAGLEV
                filled += 1
                if filled == MAGLEV:
                    break
        self._members = members
        self._table = table
        self.bytes = 8 * MAGLEV
        self._array = np.array(table)
        self._names = np.array(members)

    def owner(self, key):
        return self._members[self._table[int.from_bytes(key[:8], "big") % MAGLEV]]

    def owners(self, keys):
        hashes = np.ascontiguousarray(keys[:, :8]).view(">u8").ravel().astype(np.uint64)
        return self._names[self._array[hashes % np.uint64(MAGLEV)]]

    def order(self, key):
        first = int.from_bytes(key[:8], "big") % MAGLEV
        return tuple(dict.fromkeys(self._names[np.roll(self._array, -first)]))


def least(work, runs=5):
    times = []
    for _ in range(runs):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times)


def ownership(keys):
    table = Table("", "members", "max / mean", "one leaves", "of others", "one joins", "between others", "look-up µs",
                  "build s", "KB")  # fmt: skip
    probes = [key.tobytes() for key in keys[:20_000]]
    for size in SIZES:
        members = [f"10.0.{index // 200}.{index % 200}:8100" for index in range(size)]
        for scheme in (SlotTable, ClassicRing, Maglev):
            made, fewer, more = scheme(members), scheme(members[1:]), scheme([*members, "10.9.9.9:8100"])
            before, left, joined = made.owners(keys), fewer.owners(keys), more.owners(keys)
            counts = np.unique(before, return_counts=True)[1]
            collateral = (before != left) & (before != members[0])
            moved = before != joined
            between = moved & (joined != "10.9.9.9:8100")

            def look_up(owner=made.owner):
                for key in probes:
                    owner(key)

            table.add_row(
                scheme.name, str(size), f"{counts.max() / (KEYS / size):.3f}",
                f"{(before != left).mean():.2%}", f"{collateral.mean():.3%}",
                f"{moved.mean():.2%} (share {1 / (size + 1):.2%})", f"{between.mean():.3%}",
                f"{least(look_up) / len(probes) * 1e6:.2f}",
                f"{least(lambda scheme=scheme, members=members: scheme(members), 3):.3f}",
                f"{made.bytes / 1024:,.0f}",
            )  # fmt: skip
    console.print(table)


def overflow():
    """Simulates a fleet of 30 with a mean of 16 outstanding requests each: keys arrive, random requests end."""
    table = Table(
        "overflow goes to", "bound", "max / mean", "not at its owner", "workers asked, p99", "busiest successor"
    )
    size, load, arrivals = 30, 16, 20_000
    members = [f"10.0.0.{index}:8100" for index in range(size)]
    rng = random.Random(7)
    keys = [rng.randbytes(16) for _ in range(2000)]
    schemes = {"the next on a ring": ClassicRing(members).order, "the next in rank": SlotTable(members).order}
    orders = {name: [order(key) for key in keys] for name, order in schemes.items()}
    orders["a random jump"] = [
        (order[0], *random.Random(key).sample(order[1:], size - 1))
        for key, order in zip(keys, orders["the next on a ring"], strict=True)
    ]
    for balance in (1.1, BALANCE, 1.5, 2.0):
        for name, by_key in orders.items():
            rng = random.Random(11)
            loads = dict.fromkeys(members, 0)
            outstanding, away, hops, worst = [], 0, [], 0.0
            received: dict[str, int] = dict.fromkeys(members, 0)
            for _ in range(arrivals):
                if len(outstanding) >= size * load:
                    index = rng.randrange(len(outstanding))
                    outstanding[index], outstanding[-1] = outstanding[-1], outstanding[index]
                    loads[outstanding.pop()] -= 1
                bound = int(np.ceil(balance * (len(outstanding) + 1) / size))
                order = by_key[rng.randrange(len(keys))]
                hop = next(index for index, member in enumerate(order) if loads[member] < bound)
                chosen = order[hop]
                loads[chosen] += 1
                outstanding.append(chosen)
                hops.append(hop)
                if hop:
                    away += 1
                    received[chosen] += 1
                worst = (
                    max(worst, loads[chosen] / max(1.0, len(outstanding) / size)) if len(outstanding) > 400 else worst
                )
            hops.sort()
            mean_received = max(1e-9, away / size)
            table.add_row(
                name, f"{balance:g}", f"{worst:.2f}", f"{away / arrivals:.1%}",
                str(hops[int(arrivals * 0.99)] + 1), f"{max(received.values()) / mean_received:.1f} x mean",
            )  # fmt: skip
    console.print(table)


def main() -> None:
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "")  # noqa: PTH123, SIM115
    console.print(f"{cpu or platform.machine()}, {os.cpu_count()} cores, {KEYS:,} keys, {SLOTS:,} slots")
    keys = np.random.default_rng(3).integers(0, 256, (KEYS, 16), dtype=np.uint8)
    ownership(keys)
    overflow()


if __name__ == "__main__":
    main()
