"""How much the ledger writes, how fast it answers, and what it costs: `python -m tests.bench.ledger`.

`ingest` appends batches to a ledger with its embedded PostgreSQL for a while. `month` fills one with a month of calls,
and times each report right after a restart of PostgreSQL and from the cache, and the rebuilding of a day. `hits` loads
`ringmesh up`, as it is and with routers that have no ledger, in turn.
"""

import argparse
import asyncio
import shutil
import statistics
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import asyncpg
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from ringmesh.ledger.v1 import ledger_pb2

from router.accounting.usage_batch import Dimension
from services.ledger.reports import request_report, usage_query
from services.ledger.reports.bill import UP_TIME
from services.ledger.reports.periods import pieces
from services.ledger.reports.time_range import TimeRange
from services.ledger.storage import usage_rows
from services.ledger.storage.database import READING
from services.ledger.storage.partitions import usage_partition
from services.ledger.storage.times import WEEK_MS
from tests import installation
from tests.bench.__main__ import measure, two_trees
from tests.bench.harness import build_loadgen, count, positive
from tests.bench.results import OTHER, THIS, Results
from tests.bench.workloads import WORKLOADS
from tests.installation import SITE_PACKAGES
from tests.system import processes
from tests.system.conftest import eventually
from tests.system.ledgers import DAY_MS, HOUR_MS, Ledger, Sender, now_ms
from tests.usage_records import UsageRecord, encode

ROOT = Path(__file__).parents[2]
TENANTS, MODELS = 200, 50
BATCH = 4000
console = Console(width=140)


def zipf(random, size, count):
    """Numbers below `count`, few of them most of the time."""
    weights = 1 / np.arange(1, count + 1)
    return random.choice(count, size, p=weights / weights.sum())


def prepared_batches(count):
    """Messages whose times are to be set."""
    random = np.random.default_rng(1)
    batches = []
    for _ in range(count):
        tenants, models = zipf(random, BATCH, TENANTS), zipf(random, BATCH, MODELS)
        times = random.integers(100, 20_000, BATCH)
        traces = random.bytes(16 * BATCH)
        records = [
            UsageRecord(
                Dimension(f"tenant-{tenant}", f"model-{model}", "1", "eu", "cpu", "miss", "OK"),
                1,
                total_us=int(us) + 300,
                router_us=60,
                run_us=int(us),
                compute_us=int(us),
                batch_requests=1,
                batch_rows=1,
                rows=1,
                request_bytes=2048,
                response_bytes=512,
                trace_id=traces[16 * place : 16 * place + 16],
            )
            for place, (tenant, model, us) in enumerate(zip(tenants, models, times, strict=True))
        ]
        batches.append(ledger_pb2.Batch.FromString(encode(records)))
    return batches


class Producer(threading.Thread):
    """Appends at `rate` records a second, or as fast as it is acknowledged where that is 0.

    `times` are from when a batch was due until it was acknowledged, with its roll-ups: how far those are behind.
    """

    def __init__(self, ledger, batches, rate, seconds):
        super().__init__()
        self.sender = Sender(ledger)
        self.batches, self.rate, self.seconds = batches, rate, seconds
        self.times = []

    def run(self):
        began = time.monotonic()
        while time.monotonic() < began + self.seconds:
            batch = self.batches[len(self.times) % len(self.batches)]
            batch.ClearField("at_ms")
            batch.at_ms.extend([now_ms()] * BATCH)
            data = batch.SerializeToString()
            due = began + len(self.times) * BATCH / self.rate if self.rate else time.monotonic()
            assert self.sender.append((), batch=data).result == ledger_pb2.AppendResponse.RESULT_WRITTEN
            self.times.append(time.monotonic() - due)
            if self.rate:
                time.sleep(max(0.0, began + len(self.times) * BATCH / self.rate - time.monotonic()))


def ingest(arguments):
    """Records a second, how long acknowledgements take, memory."""
    with tempfile.TemporaryDirectory(prefix="ringmesh-bench-", dir=arguments.folder) as folder:
        ledger = Ledger(state_dir=Path(folder, "ledger"))
        process = ledger.started.info
        batches = prepared_batches(20)
        producers = [Producer(ledger, batches[number::2], arguments.rate / 2, arguments.seconds) for number in range(2)]
        cpu = process.cpu_times()
        for producer in producers:
            producer.start()
        memory = []
        while any(producer.is_alive() for producer in producers):
            time.sleep(min(5.0, arguments.seconds / 10))
            memory.append(process.memory_info().rss >> 20)
        used = process.cpu_times()
        times = sorted(took for producer in producers for took in producer.times)
        records = len(times) * BATCH
        counted = ledger.report(from_ms=now_ms() - 24 * HOUR_MS).total.requests
        console.print(
            f"{records:,} records in {arguments.seconds:.0f} s: {records / arguments.seconds:,.0f} a second; "
            f"roll-ups behind by p50 {statistics.median(times) * 1000:.0f} ms, "
            f"p99 {times[len(times) * 99 // 100] * 1000:.0f} ms, at most {times[-1] * 1000:.0f} ms; "
            f"ledger: {(used.user + used.system - cpu.user - cpu.system) / arguments.seconds:.0%} of a core, "
            f"{memory[0]} MiB at first, {memory[-1]} MiB at last; counted {counted:,}",
            soft_wrap=True,
            highlight=False,
        )
        assert counted == records
        ledger.stop()


async def fill(ledger, calls, days):
    """Writes `calls` records over the last `days`, and rebuilds each day; the seconds that each rebuild took."""
    sender = Sender(ledger)
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    first = today - timedelta(days=days)
    # Names get numbers, and days partitions, by what routers do.
    for tenant in range(TENANTS):
        dimensions = [
            Dimension(f"tenant-{tenant}", f"model-{model}", "1", "eu", "cpu", "miss", "OK") for model in range(MODELS)
        ]
        sender.append([UsageRecord(dimension, int(first.timestamp() * 1000)) for dimension in dimensions])
    sender.append(
        [
            UsageRecord(
                Dimension("tenant-0", "model-0", "1", "eu", "cpu", outcome, "OK"),
                int((first + timedelta(days=day)).timestamp() * 1000),
            )
            for day in range(days)
            for outcome in ("miss", "hit-local")
        ]
    )
    socket = Path(ledger.settings["state_dir"]) / "postgres"
    connection = await asyncpg.connect(host=str(socket), user="ringmesh", database="postgres")
    found = await connection.fetch("SELECT id, tenant, model FROM series")
    numbers = np.zeros((TENANTS, MODELS), np.int64)
    for row in found:
        numbers[int(row["tenant"].split("-")[1]), int(row["model"].split("-")[1])] = row["id"]
    kinds = {row["outcome"]: row["id"] for row in await connection.fetch("SELECT id, outcome FROM kind")}
    random = np.random.default_rng(2)
    rebuilds = []
    for day in range(days):
        begin = first + timedelta(days=day)
        for left in range(calls // days, 0, -200_000):
            rows = await asyncio.to_thread(day_rows, random, begin, min(left, 200_000), numbers, kinds)

            async def pieces(rows=rows):
                yield usage_rows.as_copy(rows)

            await connection.copy_to_table(
                usage_partition(begin.date()), source=pieces(), columns=usage_rows.NAMES, format="binary"
            )
        began = time.perf_counter()
        ledger.stub.Rebuild(ledger_pb2.RebuildRequest(day=f"{begin:%Y-%m-%d}"), timeout=600)
        rebuilds.append(time.perf_counter() - began)
        console.print(f"{begin:%Y-%m-%d}: {calls // days:,} calls, rebuilt in {rebuilds[-1]:.1f} s", highlight=False)
    # As it is after a month. Else autovacuum begins with each restart.
    await connection.execute("VACUUM (ANALYZE)")
    await connection.close()
    return rebuilds


def day_rows(random, begin, count, numbers, kinds):
    """Records of one day: two thirds hits, by tenant and model as Zipf has it."""
    rows = usage_rows.empty(count)
    at = np.sort(random.integers(0, DAY_MS, count)) + int(begin.timestamp() * 1000)
    usage_rows.set_times(rows, at)
    is_hit = random.random(count) < 2 / 3
    us = random.integers(500, 20_000, count)
    rows["series"] = numbers[zipf(random, count, TENANTS), zipf(random, count, MODELS)]
    rows["kind"] = np.where(is_hit, kinds["hit-local"], kinds["miss"])
    rows["requests"] = 1
    rows["compute_us"] = np.where(is_hit, 0, us)
    rows["saved_us"] = np.where(is_hit, us, 0)
    rows["router_us"] = 60
    rows["total_us"] = np.where(is_hit, 60, us + 300)
    rows["request_bytes"] = 2048
    rows["trace_id"] = np.frombuffer(random.bytes(16 * count), "V16")
    return rows


def questions(ledger, days):
    """Each report by name."""
    begin = now_ms() // HOUR_MS * HOUR_MS - days * DAY_MS
    until = now_ms() // HOUR_MS * HOUR_MS
    trace = ledger.report("request", from_ms=until - 25 * HOUR_MS, until_ms=until - 24 * HOUR_MS, limit=1).rows
    month = {"from_ms": begin, "until_ms": until}
    found = {
        f"by {by}": lambda by=by: ledger.report(by, **month) for by in ("tenant", "model", "version", "region", "day")
    }
    found["by tenant and model"] = lambda: ledger.report("tenant", "model", **month)
    found["one tenant by model"] = lambda: ledger.report("model", tenant="tenant-3", **month)
    found["changes by tenant"] = lambda: ledger.report("tenant", changes=True, from_ms=until - 7 * DAY_MS)
    found["requests of an hour"] = lambda: ledger.report(
        "request", from_ms=until - 25 * HOUR_MS, until_ms=until - 24 * HOUR_MS, limit=100
    )
    if trace:
        found["one request by trace"] = lambda: ledger.report(from_ms=0, trace_id=trace[0].request.trace_id)
    found["bill"] = lambda: ledger.stub.Bill(ledger_pb2.BillRequest(**month))
    found["forecast"] = lambda: ledger.stub.Forecast(ledger_pb2.ForecastRequest())
    return found


def month(arguments):
    """How long reports take over a month of calls."""
    with tempfile.TemporaryDirectory(prefix="ringmesh-bench-", dir=arguments.folder) as folder:
        cache = processes.start("cache")
        ledger = Ledger(state_dir=Path(folder, "ledger"), cache_address=cache.address)
        rebuilds = asyncio.run(fill(ledger, arguments.calls, arguments.days))
        asked = questions(ledger, arguments.days)
        table = Table("report", "after a restart, ms", "again, ms (median of 20)", "cached")
        for name, ask in asked.items():
            restart_postgres(ledger)
            # A connection, which takes as long as it takes.
            ledger.stub.ListPrices(ledger_pb2.ListPricesRequest())
            first, _ = timed(ask)
            again = [timed(ask) for _ in range(20)]
            cached = getattr(again[-1][1], "cached", False)
            median = statistics.median(took for took, _ in again)
            table.add_row(name, f"{first * 1000:.1f}", f"{median * 1000:.1f}", str(cached))
        console.print(
            f"{arguments.calls:,} calls in {arguments.days} days; a day rebuilt in {max(rebuilds):.1f} s at most"
        )
        console.print(table)
        written = asyncio.run(plans(ledger, arguments.calls, arguments.days))
        if arguments.write:
            (ROOT / "docs/ledger-plans.md").write_text(written)
        else:
            console.print(written, highlight=False, soft_wrap=True)
        ledger.stop()
        processes.kill(cache)


async def plans(ledger, calls, days):
    """How PostgreSQL goes about each report, as a document."""
    until = now_ms() // HOUR_MS * HOUR_MS
    range_ = TimeRange(until - days * DAY_MS, until)
    cells = pieces([range_.from_ms, range_.until_ms], until // WEEK_MS * WEEK_MS)
    statements = {
        f"by {', '.join(groups) or 'nothing'}{' of one ' + name if name else ''}": usage_query.statement(
            cells, groups, {name: f"{name}-3"} if name else {}
        )
        for groups, name in (
            ((), ""),
            (("tenant",), ""),
            (("model",), ""),
            (("version",), ""),
            (("region",), ""),
            (("day",), ""),
            (("tenant", "model"), ""),
            (("model",), "tenant"),
        )
    }
    hour = TimeRange(until - 25 * HOUR_MS, until - 24 * HOUR_MS)
    statements["single requests of an hour"] = request_report.statement(hour, "", {}, 100)
    statements["one request by trace"] = request_report.statement(range_, "ab" * 16, {}, 100)
    begins = [datetime.fromtimestamp(at / 1000, UTC) for at in (range_.from_ms, range_.until_ms)]
    statements["time that workers were up, for the bill"] = (UP_TIME, [[0], begins[:1], begins[1:]])
    text = [
        "# How PostgreSQL goes about each report",
        f"Written by `python -m tests.bench.ledger month --write`, over {calls:,} calls in {days} days. Changes and "
        "the forecast are the statements of their groups, over other ranges.",
    ]
    socket = Path(ledger.settings["state_dir"]) / "postgres"
    connection = await asyncpg.connect(host=str(socket), user="ringmesh", database="postgres")
    await connection.execute(READING.format(timeout=0).replace("LOCAL ", ""))
    for name, (sql, arguments) in statements.items():
        rows = await connection.fetch(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, BUFFERS OFF) {sql}", *arguments)
        lines = [row[0] for row in rows if "Planning Time" not in row[0]]
        text.append(f"## {name[0].upper()}{name[1:]}\n\n```\n" + "\n".join(lines) + "\n```")
    await connection.close()
    return "\n\n".join(text) + "\n"


def restart_postgres(ledger):
    """With empty buffers; the file cache of the system stays."""
    postmaster = ledger.postgres()
    postmaster.send_signal(2)
    psutil.wait_procs([postmaster], timeout=60)

    def is_back():
        try:
            ledger.stub.ListPrices(ledger_pb2.ListPricesRequest(), timeout=5)
        except Exception:
            return False
        return True

    eventually(is_back, 60)


def timed(ask):
    began = time.perf_counter()
    answer = ask()
    return time.perf_counter() - began, answer


def hits(arguments):
    """Hits a second with metering, as part of those without."""
    with tempfile.TemporaryDirectory(prefix="ringmesh-bench-", dir=arguments.folder) as folder:
        for part in ("cache", "router", "services", *(found.name for found in SITE_PACKAGES.glob("*__mypyc.*"))):
            copy = shutil.copytree if (SITE_PACKAGES / part).is_dir() else shutil.copy
            copy(SITE_PACKAGES / part, Path(folder, part))
        stack = Path(folder, "services/cli/stack/stack.py")
        without = stack.read_text().replace('                "RINGMESH_LEDGER_ADDRESS"', '                "NO_LEDGER"')
        assert without != stack.read_text()
        stack.write_text(without)
        found = Results()
        for start in range(arguments.starts):
            rounds = range(arguments.rounds * start, arguments.rounds * (start + 1))
            peers = partial(two_trees, other=Path(folder))
            measure(WORKLOADS[0], (16, 64), peers, build_loadgen(), arguments.seconds, rounds, found)
    for outstanding in (16, 64):
        rates, cpu = (found.ratios(what, WORKLOADS[0].name, outstanding, THIS, OTHER) for what in ("rps", "cpu_us"))
        here, there = (found.find(WORKLOADS[0].name, outstanding, name).median("rps") for name in (THIS, OTHER))
        console.print(
            f"{outstanding} calls at a time: {here:,.0f} hits/s with the ledger, {there:,.0f} without; {len(rates)} "
            f"pairs, {quartiles(rates)} times as many, with {quartiles(cpu)} times the CPU for each",
            highlight=False,
            soft_wrap=True,
        )


def quartiles(values):
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ledger", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the database is made; without it, of temporary files")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("ingest")
    command.add_argument("--seconds", type=positive, default=600)
    command.add_argument(
        "--rate", type=positive, default=0, help="records a second; as fast as they are taken without it"
    )
    command.set_defaults(run=ingest)
    command = commands.add_parser("month")
    command.add_argument("--calls", type=count, default=50_000_000)
    command.add_argument("--days", type=count, default=30)
    command.add_argument("--write", action="store_true", help="write docs/ledger-plans.md")
    command.set_defaults(run=month)
    command = commands.add_parser("hits")
    command.add_argument("--seconds", type=positive, default=1)
    command.add_argument("--rounds", type=count, default=12, help="of each start")
    command.add_argument("--starts", type=count, default=3)
    command.set_defaults(run=hits)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    installation.choose()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
