"""The ledger under faults: what was acknowledged is counted once, whatever was killed, and whenever."""

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import asyncpg
import grpc
import psutil
import pytest
from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.storage import migrations
from services.ledger.storage.cubes import CUBES
from services.ledger.storage.database import Database
from services.ledger.storage.migrations import FOLDER
from services.ledger.storage.partitions import Partitions, Retention
from services.ledger.storage.rollups import GRAINS
from services.ledger.storage.times import week_of
from tests.system import processes
from tests.system.conftest import eventually
from tests.system.ledgers import (
    DAY_MS,
    DUPLICATE,
    HOUR_MS,
    WRITTEN,
    Ledger,
    Sender,
    hits,
    miss,
    now_ms,
    unique,
    worker_time,
)
from tests.usage_records import encode

# Minutes in all; the default run kills the ledger of a stack, in test_metering.py.
pytestmark = pytest.mark.proof

RETRIED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL}


@pytest.fixture(scope="module")
def created(tmp_path_factory):
    """The folder of a ledger that has ended: where a copy is, the database need not be created and migrated."""
    folder = tmp_path_factory.mktemp("created") / "ledger"
    ledger = Ledger(state_dir=folder)
    Sender(ledger).append([miss("nobody")])
    ledger.stop()
    return folder


@pytest.fixture
def start_ledger(created, tmp_path):
    """Starts a ledger, and again with the same database."""
    subprocess.run(["cp", "-a", created, tmp_path], check=True)
    started = []
    settings = {"state_dir": tmp_path / "ledger", "address": processes.free_address(), "drain_seconds": 1}

    def start(**more):
        started.append(Ledger(**settings, **more))
        return started[-1]

    yield start
    for ledger in started:
        ledger.stop()


class Load(threading.Thread):
    """A router that sends batches until told to stop, each again until it is acknowledged; counts what was."""

    def __init__(self, ledger, tenant):
        super().__init__()
        self.sender = Sender(ledger)
        self.tenant = tenant
        self.stopping = False
        self.requests = self.compute_us = self.batches = self.repeats = 0

    def run(self):
        random.seed(self.sender.router_id)
        sequence = 0
        while not self.stopping:
            sequence += 1
            records = [
                miss(self.tenant, compute_us=random.randrange(10_000), model=f"m{random.randrange(9)}")
                if random.random() < 0.7
                else hits(self.tenant, random.randrange(1, 50))
                for _ in range(random.randrange(1, 400))
            ]
            batch = encode(records)
            while not self.stopping:
                try:
                    answer = self.sender.append((), sequence=sequence, batch=batch)
                except grpc.RpcError as error:
                    if error.code() not in RETRIED:
                        raise
                    self.repeats += 1
                    time.sleep(0.02)
                    continue
                assert answer.last_sequence == sequence, answer
                self.batches += 1
                self.requests += sum(record.requests for record in records)
                self.compute_us += sum(record.compute_us for record in records)
                break

    def stop(self):
        self.stopping = True
        self.join(60)


def finish(loads):
    """Lets each batch under way be acknowledged, then stops: nothing is left of which nobody knows."""
    for load in loads:
        batches = load.batches
        eventually(lambda load=load, batches=batches: load.batches > batches, 60)
    for load in loads:
        load.stop()


def assert_counted(ledger, loads, tenant):
    expected = (sum(load.requests for load in loads), sum(load.compute_us for load in loads))
    # A batch that was under way when the load stopped may have been counted, and its router would send it again.
    found = ledger.report(tenant=tenant, from_ms=now_ms() - HOUR_MS).total
    assert (found.requests, found.compute_us) == expected
    # At 0.00001 a second, 100 us are a nano-unit.
    assert found.cost_nano == (expected[1] + 50) // 100
    asyncio.run(assert_grains_agree(ledger))


async def connect(ledger):
    socket = Path(ledger.settings["state_dir"]) / "postgres"
    return await asyncpg.connect(host=str(socket), user="ringmesh", database="postgres")


async def assert_grains_agree(ledger):
    """Records and the cells of each grain have the same sums for each series."""
    connection = await connect(ledger)
    sums = {}
    for table in ("usage", *(f"rollup_{grain}" for grain in GRAINS if grain != "week")):
        rows = await connection.fetch(
            "SELECT series, sum(requests), sum(compute_us), sum(saved_us), sum(router_us) "
            f"FROM {table} GROUP BY 1 ORDER BY 1"
        )
        sums[table] = [tuple(row) for row in rows]
    names = "requests", "compute_us", "saved_us", "router_us"
    wanted = [sum(row[place] for row in sums["usage"]) for place in range(1, 5)]
    for grain in ("minute", "hour", "day"):
        rows = await connection.fetch(
            f"SELECT {', '.join(f'sum({name})' for name in names)} FROM margin_{grain} r "
            "JOIN margin m ON m.id = r.series GROUP BY m.cube"
        )
        assert [list(row) for row in rows] == [wanted] * len(CUBES)
    await connection.close()
    assert all(found == sums["usage"] for found in sums.values())


def kill_postgres(ledger):
    """The postmaster and, at random, one of its sessions first."""
    eventually(ledger.postgres)
    with suppress(psutil.NoSuchProcess, AttributeError):
        postmaster = ledger.postgres()
        for child in postmaster.children() if random.random() < 0.5 else ():
            # The others end with the first.
            with suppress(psutil.NoSuchProcess):
                if "ringmesh" in " ".join(child.cmdline()):
                    child.kill()
        postmaster.kill()


def kill_ledger(ledger):
    ledger.started.process.kill()
    ledger.started.process.wait()


def start_and_kill(ledger):
    """Kills it again while it starts, in the recovery of its database."""
    environment = {f"RINGMESH_{name.upper()}": str(value) for name, value in ledger.settings.items()}
    process = subprocess.Popen([sys.executable, "-m", "services.ledger"], env={**os.environ, **environment})
    time.sleep(random.random() * 2)
    process.kill()
    process.wait()


def restart(ledger):
    """A new process behind the same address and database."""
    ledger.started = processes.start("services.ledger", **ledger.settings)


@pytest.mark.parametrize("is_ledger_killed", [False, True])
def test_a_session_that_outlives_its_server_does_not_keep_the_next_one_from_starting(start_ledger, is_ledger_killed):
    ledger, tenant = start_ledger(), unique("tenant")
    Sender(ledger).append([hits(tenant, 3)])
    postmaster = ledger.postgres()
    session = next(child for child in postmaster.children() if "ringmesh" in " ".join(child.cmdline()))
    session.suspend()
    postmaster.kill()
    if is_ledger_killed:
        kill_ledger(ledger)
        restart(ledger)
    sender = Sender(ledger)

    def is_appended():
        with suppress(grpc.RpcError):
            return sender.append([hits(tenant, 4)])

    eventually(is_appended)
    assert ledger.report(tenant=tenant).total.requests == 7


def test_after_a_kill_of_each_what_was_acknowledged_is_counted_once(start_ledger):
    random.seed(1)
    ledger, tenant = start_ledger(), unique("tenant")
    loads = [Load(ledger, tenant) for _ in range(2)]
    for load in loads:
        load.start()
    eventually(lambda: all(load.batches > 3 for load in loads))
    kill_postgres(ledger)
    eventually(lambda: any(load.repeats > 0 for load in loads))
    finish_one = sum(load.batches for load in loads)
    eventually(lambda: sum(load.batches for load in loads) > finish_one + 5, 60)
    kill_ledger(ledger)
    restart(ledger)
    finish(loads)
    assert_counted(ledger, loads, tenant)


@pytest.mark.parametrize("victim", ["ledger", "postgres", "both", "twice", "ledger twice"])
def test_kills_at_random_points_under_load(start_ledger, victim):
    random.seed(victim)
    ledger, tenant = start_ledger(), unique("tenant")
    loads = [Load(ledger, tenant) for _ in range(3)]
    for load in loads:
        load.start()
    for _ in range(3):
        batches = sum(load.batches for load in loads)
        eventually(lambda batches=batches: sum(load.batches for load in loads) > batches + 10, 60)
        time.sleep(random.random() * 0.3)
        if victim in ("postgres", "both", "twice"):
            kill_postgres(ledger)
            if victim == "twice":
                eventually(ledger.postgres)
                kill_postgres(ledger)
        if victim in ("ledger", "both", "ledger twice"):
            kill_ledger(ledger)
            if victim == "ledger twice":
                start_and_kill(ledger)
            restart(ledger)
    finish(loads)
    assert sum(load.repeats for load in loads)
    assert_counted(ledger, loads, tenant)


@pytest.mark.parametrize("victim", ["ledger", "postgres"])
@pytest.mark.parametrize("table", ["producer", "usage", "rollup_minute", "margin_day", "worker_minute", "day_version"])
def test_a_kill_in_the_middle_of_a_transaction(start_ledger, table, victim):
    """That waits at a table which the test holds: before the mark, in COPY, in the roll-ups, before the end."""
    ledger, tenant = start_ledger(), unique("tenant")
    sender = Sender(ledger)
    sender.append([miss(tenant)])
    batch = encode([miss(tenant), hits(tenant, 5)], [worker_time("w", now_ms() // 60_000)])

    def send():
        try:
            return sender.append((), sequence=2, batch=batch).result
        except grpc.RpcError:
            return None

    async def kill_while_it_waits():
        holder = await connect(ledger)
        waiting = await connect(ledger)
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        sending = asyncio.create_task(asyncio.to_thread(send))
        async with asyncio.timeout(60):
            while not await waiting.fetchval(
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation IN "
                "(SELECT $1::regclass UNION SELECT inhrelid FROM pg_inherits WHERE inhparent = $1::regclass)",
                table,
            ):
                await asyncio.sleep(0.01)
        (kill_postgres if victim == "postgres" else kill_ledger)(ledger)
        holder.terminate()
        waiting.terminate()
        return await sending

    # A session outlives its postmaster for an instant, and may commit once the lock is gone.
    assert asyncio.run(kill_while_it_waits()) in (None, *([WRITTEN] if victim == "postgres" else []))
    if victim == "ledger":
        restart(ledger)
    eventually(lambda: send() in (WRITTEN, DUPLICATE), 60)
    assert send() == DUPLICATE
    assert ledger.report(tenant=tenant).total.requests == 7
    asyncio.run(assert_grains_agree(ledger))
    bill = ledger.stub.Bill(ledger_pb2.BillRequest(from_ms=now_ms() - HOUR_MS, allow_unpriced=True))
    assert next(row.paid_us for row in bill.rows if row.worker_type == "cpu") == 60_000_000


def test_an_idle_ledger_that_is_killed_leaves_no_postgres(start_ledger):
    ledger = start_ledger()
    postmaster = ledger.postgres()
    kill_ledger(ledger)
    assert not psutil.wait_procs([postmaster], timeout=60)[1]
    restart(ledger)
    assert Sender(ledger).append([miss("t")]).last_sequence == 1


def test_a_postgres_that_is_killed_before_it_has_written_its_lock_files_is_started_again(start_ledger):
    ledger = start_ledger()
    postmaster = ledger.postgres()
    kill_ledger(ledger)
    psutil.wait_procs([postmaster], timeout=60)
    for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
        (Path(ledger.settings["state_dir"]) / "postgres" / name).write_bytes(b"")
    restart(ledger)
    assert Sender(ledger).append([miss("t")]).last_sequence == 1


def test_an_idle_ledger_whose_postgres_is_killed_goes_on(start_ledger):
    ledger, tenant = start_ledger(), unique("tenant")
    sender = Sender(ledger)
    sender.append([hits(tenant, 3)])
    killed = ledger.postgres().pid
    kill_postgres(ledger)

    def is_started_again():
        started = ledger.postgres()
        return started is not None and started.pid != killed

    eventually(is_started_again, 60)

    def is_appended():
        with suppress(grpc.RpcError):
            return sender.append([hits(tenant, 4)])

    eventually(is_appended, 60)
    assert ledger.report(tenant=tenant).total.requests == 7


@pytest.mark.parametrize("victim", ["ledger", "postgres", "router"])
def test_a_kill_while_the_database_is_created_or_migrated_is_made_good(tmp_path, victim):
    settings = {"state_dir": tmp_path / "ledger", "address": processes.free_address()}
    environment = {f"RINGMESH_{name.upper()}": str(value) for name, value in settings.items()}
    environment["RINGMESH_METRICS_ADDRESS"] = "127.0.0.1:0"
    tenant = unique("tenant")
    random.seed(3)
    begun = done = 0
    for _ in range(4):
        command = [sys.executable, "-c", SENDING_ROUTER, str(tmp_path / "spool"), settings["address"], tenant]
        router = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process = subprocess.Popen([sys.executable, "-m", "services.ledger"], env={**os.environ, **environment})
        time.sleep(0.5 + random.random() * 2.5)
        for child in psutil.Process(process.pid).children(recursive=True) if victim == "postgres" else ():
            with suppress(psutil.NoSuchProcess):
                child.kill()
        if victim == "ledger":
            process.kill()
        router.kill()
        lines = router.stdout.read().split()
        router.wait()
        begun, done = begun + lines.count("begin"), done + lines.count("done")
        process.kill()
        process.wait()
    ledger = Ledger(**settings)
    asyncio.run(drain(tmp_path / "spool", ledger.started.address))
    assert done <= ledger.report(tenant=tenant).total.requests // 10 <= begun
    ledger.stop()


@pytest.mark.parametrize("victim", ["ledger", "postgres"])
def test_a_kill_in_the_middle_of_a_migration(start_ledger, victim):
    """Of a second ledger on the database of the first, which writes again when its table is there."""
    ledger, tenant = start_ledger(), unique("tenant")
    sender = Sender(ledger)
    sender.append([hits(tenant, 3)])
    settings = {"DATABASE_URL": url_of(ledger), "ADDRESS": processes.free_address(), "METRICS_ADDRESS": "127.0.0.1:0"}
    environment = {**os.environ, **{f"RINGMESH_{name}": value for name, value in settings.items()}}
    command, started = [sys.executable, "-m", "services.ledger"], []

    async def kill_while_it_waits():
        socket = Path(ledger.settings["state_dir"]) / "postgres"
        await migrations.roll_back(f"postgres://ringmesh@/postgres?socket={socket}")
        holder, waiting = await connect(ledger), await connect(ledger)
        await holder.transaction().start()
        await holder.execute("LOCK TABLE schema_migrations IN SHARE MODE")
        started.append(await asyncio.to_thread(subprocess.Popen, command, env=environment))
        async with asyncio.timeout(60):
            while not await waiting.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
        if victim == "ledger":
            started[0].kill()
        else:
            kill_postgres(ledger)
        holder.terminate()
        waiting.terminate()

    asyncio.run(kill_while_it_waits())
    if victim == "ledger":
        started.append(subprocess.Popen(command, env=environment))
    batch = encode([hits(tenant, 4)])

    def is_appended():
        with suppress(grpc.RpcError):
            return sender.append((), sequence=2, batch=batch)

    try:
        eventually(is_appended, 60)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert ledger.report(tenant=tenant).total.requests == 7
    asyncio.run(assert_grains_agree(ledger))


@pytest.mark.parametrize("table", ["producer", "usage", "rollup_minute", "margin_day", "day_version"])
def test_a_router_that_is_killed_while_its_batch_is_written(start_ledger, table, tmp_path):
    """The ledger may commit what the router never heard of; its next life sends it again."""
    ledger, tenant = start_ledger(), unique("tenant")
    command = [sys.executable, "-c", SENDING_ROUTER, str(tmp_path / "spool"), ledger.started.address, tenant]
    Sender(ledger).append([miss(tenant)])

    async def kill_while_it_waits():
        holder = await connect(ledger)
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        router = await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.PIPE, text=True)
        async with asyncio.timeout(60):
            while not await holder.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
        router.kill()
        await transaction.rollback()
        await holder.close()
        lines = await asyncio.to_thread(router.stdout.read)
        router.wait()
        return lines.split().count("begin"), lines.split().count("done")

    begun, done = asyncio.run(kill_while_it_waits())
    asyncio.run(drain(tmp_path / "spool", ledger.started.address))
    assert done <= (ledger.report(tenant=tenant).total.requests - 1) // 10 <= begun
    asyncio.run(assert_grains_agree(ledger))


@pytest.mark.parametrize(
    "table", ["usage", "rollup_minute", "margin_minute", "worker_minute", "key_sample", "batch_digest"]
)
def test_any_partition_that_was_dropped_by_hand_is_made_again(start_ledger, table):
    ledger, tenant = start_ledger(), unique("tenant")
    sender, at_ms = Sender(ledger), now_ms()
    minute = at_ms // 60_000
    sample = ledger_pb2.KeySample(model="mlp", below=16, at_ms=at_ms, requests=1)
    rest = {"worker_times": [worker_time("w", minute)], "key_samples": [sample]}
    sender.append([miss(tenant, at_ms)], **rest)

    async def drop():
        connection = await connect(ledger)
        await connection.execute(f"DROP TABLE {table}_{datetime.fromtimestamp(minute * 60, UTC):%Y%m%d}")
        await connection.close()

    asyncio.run(drop())
    assert sender.append([miss(tenant, at_ms)], **rest).result == WRITTEN
    if table in ("rollup_minute", "margin_minute"):
        # What it summed is in the records.
        ledger.stub.Rebuild(ledger_pb2.RebuildRequest(day=f"{datetime.fromtimestamp(minute * 60, UTC):%Y-%m-%d}"))
    assert ledger.report("day", tenant=tenant, from_ms=now_ms() // DAY_MS * DAY_MS - DAY_MS).total.requests == 2
    if table != "usage":
        asyncio.run(assert_grains_agree(ledger))


@pytest.mark.parametrize("table", ["rollup_hour", "rollup_day", "rollup_week", "margin_day", "margin_week"])
def test_sums_of_a_month_that_were_dropped_by_hand_are_rebuilt(start_ledger, table):
    ledger, tenant = start_ledger(), unique("tenant")
    Sender(ledger).append([miss(tenant)])

    async def drop():
        connection = await connect(ledger)
        day = datetime.now(UTC).date()
        await connection.execute(f"DROP TABLE {table}_{week_of(day) if 'week' in table else day:%Y%m}")
        await connection.close()

    asyncio.run(drop())
    ledger.stub.Rebuild(ledger_pb2.RebuildRequest(day=f"{datetime.now(UTC):%Y-%m-%d}"))
    assert ledger.report("day", tenant=tenant).total.requests == 1
    asyncio.run(assert_grains_agree(ledger))


def test_a_rebuild_without_a_partition_that_was_dropped_by_hand_is_refused(start_ledger):
    ledger, tenant = start_ledger(), unique("tenant")
    sender, at_ms = Sender(ledger), now_ms()
    day = datetime.fromtimestamp(at_ms / 1000, UTC)
    sender.append([miss(tenant, at_ms)])

    async def drop():
        connection = await connect(ledger)
        await connection.execute(f"DROP TABLE usage_{day:%Y%m%d}")
        await connection.close()

    asyncio.run(drop())
    sender.append([miss(tenant, at_ms)])
    # What was counted stays counted, and a rebuild would lose it.
    assert ledger.report(tenant=tenant).total.requests == 2
    with pytest.raises(grpc.RpcError, match="records were dropped, and what they counted would be lost"):
        ledger.stub.Rebuild(ledger_pb2.RebuildRequest(day=f"{day:%Y-%m-%d}"))
    assert ledger.report(tenant=tenant).total.requests == 2


def test_a_full_disk_delays_batches_and_loses_none(tmp_path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)], check=True)
    try:
        ledger, tenant = Ledger(state_dir=folder / "ledger", address=processes.free_address()), unique("tenant")
        sender = Sender(ledger)
        sender.append([miss(tenant)])
        filler = folder / "filler"
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 20))
            except OSError:
                pass
        batch = encode([miss(tenant)] * 40_000)
        failed = 0
        for sequence in range(2, 20):
            try:
                sender.append((), sequence=sequence, batch=batch)
            except grpc.RpcError as error:
                if error.code() not in RETRIED:
                    raise
                failed = sequence
                break
        assert failed
        filler.unlink()

        def is_taken():
            try:
                return sender.append((), sequence=failed, batch=batch).last_sequence == failed
            except grpc.RpcError:
                return False

        eventually(is_taken, 60)
        assert ledger.report(tenant=tenant).total.requests == 1 + 40_000 * (failed - 1)
        ledger.stop()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_migrations_go_back_and_forth(start_ledger):
    ledger = start_ledger()
    Sender(ledger).append([miss("t")])
    socket = Path(ledger.settings["state_dir"]) / "postgres"
    url = f"postgres://ringmesh@/postgres?socket={socket}"

    async def back_and_forth():
        connection = await connect(ledger)
        for _ in FOLDER.glob("*.sql"):
            await migrations.roll_back(url)
        left = await connection.fetch("SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace")
        assert {row["relname"] for row in left} == {"schema_migrations", "schema_migrations_pkey"}
        await connection.execute("INSERT INTO schema_migrations VALUES ('29991231000000')")
        await connection.close()

    asyncio.run(back_and_forth())
    kill_ledger(ledger)
    refused = subprocess.run(
        [sys.executable, "-m", "services.ledger"],
        env={
            **os.environ,
            **{f"RINGMESH_{name.upper()}": str(value) for name, value in ledger.settings.items()},
            "RINGMESH_METRICS_ADDRESS": "127.0.0.1:0",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 2
    assert "belongs to a newer ledger" in refused.stderr


def test_weeks_are_filled_when_a_database_from_before_is_migrated(start_ledger):
    ledger, tenant = start_ledger(), unique("tenant")
    begin = now_ms() - 30 * DAY_MS
    # Two months at least, and weeks that begin in one and end in the next.
    Sender(ledger).append([miss(tenant, begin + day * DAY_MS, compute_us=day) for day in range(31)])
    url = f"postgres://ringmesh@/postgres?socket={Path(ledger.settings['state_dir']) / 'postgres'}"

    async def back_and_forth():
        connection = await connect(ledger)
        while await connection.fetchval("SELECT to_regclass('rollup_week')") is not None:
            await migrations.roll_back(url)
        await connection.close()
        await migrations.migrate(url)

    asyncio.run(back_and_forth())
    asyncio.run(assert_weeks_agree(ledger))
    assert ledger.report(tenant=tenant, from_ms=begin).total.compute_us == sum(range(31))
    Sender(ledger).append([miss(tenant, begin)])
    asyncio.run(assert_weeks_agree(ledger))


def test_a_batch_whose_digest_is_not_kept_any_more_is_not_counted_again(start_ledger):
    ledger, tenant = start_ledger(), unique("tenant")
    sender = Sender(ledger)
    for sequence in (1, 2, 3):
        sender.append([miss(tenant)], sequence=sequence)

    async def forget():
        connection = await connect(ledger)
        await connection.execute("DELETE FROM batch_digest")
        await connection.close()

    asyncio.run(forget())
    answer = sender.append([miss(tenant, compute_us=7)], sequence=1)
    assert (answer.result, answer.last_sequence) == (ledger_pb2.AppendResponse.RESULT_DUPLICATE, 3)
    assert ledger.report(tenant=tenant).total.requests == 3


async def assert_weeks_agree(ledger):
    connection = await connect(ledger)
    for kind in ("rollup", "margin"):
        of_days, of_weeks = [
            await connection.fetch(
                f"SELECT date_bin('1 week', at, 'epoch') AS week, series, sum(requests), sum(compute_us), "
                f"sum(response_bytes) FROM {kind}_{grain} WHERE at < (SELECT until FROM weeks_summed) "
                "GROUP BY 1, 2 ORDER BY 1, 2"
            )
            for grain in ("day", "week")
        ]
        assert of_days == of_weeks
        assert of_days
    await connection.close()


def test_weeks_that_end_are_summed_with_the_next_batch(start_ledger):
    ledger, tenant = start_ledger(), unique("tenant")
    begin = now_ms() - 40 * DAY_MS
    Sender(ledger).append([miss(tenant, now_ms() - day * DAY_MS, compute_us=day) for day in range(34)])

    async def be_behind():
        """As a ledger that was down for three weeks."""
        connection = await connect(ledger)
        await connection.execute(
            "UPDATE weeks_summed SET until = until - interval '21 days'; "
            "DELETE FROM rollup_week USING weeks_summed w WHERE at >= w.until; "
            "DELETE FROM margin_week USING weeks_summed w WHERE at >= w.until"
        )
        await connection.close()

    asyncio.run(be_behind())
    totals = [ledger.report(tenant=tenant, from_ms=begin, until_ms=now_ms() - 3600_000).total.compute_us]
    Sender(ledger).append([miss(tenant, now_ms() - 20 * DAY_MS, compute_us=1000)])
    asyncio.run(assert_weeks_agree(ledger))
    totals.append(ledger.report(tenant=tenant, from_ms=begin, until_ms=now_ms() - 3600_000).total.compute_us)
    assert totals == [sum(range(34)), sum(range(34)) + 1000]


def test_a_rebuilt_day_sums_its_week_again_with_the_other_days(start_ledger):
    ledger, tenant = start_ledger(), unique("tenant")
    days = [now_ms() - day * DAY_MS for day in range(10)]
    Sender(ledger).append([miss(tenant, at_ms) for at_ms in days])

    async def lose_weeks():
        connection = await connect(ledger)
        await connection.execute("DELETE FROM rollup_week; DELETE FROM margin_week")
        await connection.close()

    asyncio.run(lose_weeks())
    for at_ms in days:
        ledger.stub.Rebuild(ledger_pb2.RebuildRequest(day=f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d}"))
    asyncio.run(assert_weeks_agree(ledger))
    assert ledger.report(tenant=tenant, from_ms=days[-1] - 30 * DAY_MS).total.requests == len(days)


def test_what_is_dropped_for_its_age_stays_in_the_sums(start_ledger):
    ledger, tenant = start_ledger(), unique("tenant")
    begin = now_ms() - 30 * DAY_MS
    Sender(ledger).append([miss(tenant, begin), miss(tenant)])
    before = ledger.report("day", tenant=tenant, from_ms=begin - DAY_MS)

    async def drop():
        database = Database(url_of(ledger), None)
        await database.open()
        partitions = Partitions(Retention(usage=20, minutes=3, rollups=1100))
        dropped = await partitions.drop_old(database, datetime.now(UTC))
        await database.close()
        return dropped

    day = datetime.fromtimestamp(begin / 1000, UTC)
    dropped = asyncio.run(drop())
    assert f"usage_{day:%Y%m%d}" in dropped
    assert f"rollup_minute_{day:%Y%m%d}" in dropped
    assert f"usage_{datetime.now(UTC):%Y%m%d}" not in dropped
    assert ledger.report("day", tenant=tenant, from_ms=begin - DAY_MS).rows == before.rows
    assert len(before.rows) == 2


def test_a_batch_that_the_database_refuses_holds_up_no_other(start_ledger):
    ledger, full, tenant = start_ledger(), unique("tenant"), unique("tenant")
    Sender(ledger).append([miss(full)])

    async def fill():
        connection = await connect(ledger)
        await connection.execute(
            "UPDATE rollup_day SET compute_us = 9223372036854775807 "
            "WHERE series = (SELECT id FROM series WHERE tenant = $1)",
            full,
        )
        await connection.close()

    asyncio.run(fill())
    loads = [Load(ledger, tenant) for _ in range(2)]
    for load in loads:
        load.start()
    for _ in range(5):
        with pytest.raises(grpc.RpcError) as refused:
            Sender(ledger).append([miss(full)])
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "the batch cannot be written: bigint out of range" in refused.value.details()
    finish(loads)
    assert ledger.report(tenant=tenant).total.requests == sum(load.requests for load in loads)


def test_two_ledgers_on_one_database_write_one_after_the_other(start_ledger):
    one, tenant = start_ledger(), unique("tenant")
    other = Ledger(database_url=url_of(one))
    loads = [Load(ledger, tenant) for ledger in (one, other)]
    for load in loads:
        load.start()
    eventually(lambda: all(load.batches > 10 for load in loads), 60)
    finish(loads)
    other.stop()
    assert_counted(one, loads, tenant)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has folders that others may not enter")
def test_a_folder_that_only_root_may_enter_and_whose_name_is_long_will_do(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o700)
    ledger = Ledger(state_dir=folder / ("long" * 40))
    assert Sender(ledger).append([miss("t")]).last_sequence == 1
    assert ledger.postgres().username() != "root"
    ledger.stop()


def url_of(ledger):
    socket = Path(ledger.settings["state_dir"]) / "postgres"
    return f"postgresql://ringmesh@/postgres?host={quote(str(socket), safe='')}"


SENDING_ROUTER = """
import asyncio, itertools, sys, time
from pathlib import Path
from router.accounting.ledger_sender import LedgerSender
from router.accounting.ledger_spool import LedgerSpool
from tests.usage_records import encode
from tests.system.ledgers import miss

async def main():
    spool = LedgerSpool(Path(sys.argv[1]), 1 << 30, time.time_ns)
    spool.open()
    sender = LedgerSender(spool, sys.argv[2])
    sender.start()
    for number in itertools.count():
        # What is printed first and then spooled may be missing; what is spooled and then printed may not.
        print("begin", flush=True)
        await sender.submit(encode([miss(sys.argv[3])] * 10), 10, 10)
        print("done", flush=True)
        await asyncio.sleep(0.002)

asyncio.run(main())
"""


def test_after_kills_of_the_router_all_that_it_spooled_is_counted(start_ledger, tmp_path):
    random.seed(4)
    ledger, tenant = start_ledger(), unique("tenant")
    begun = done = 0
    for life in range(3):
        command = [sys.executable, "-c", SENDING_ROUTER, str(tmp_path / "spool"), ledger.started.address, tenant]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "begin\n"
        time.sleep(random.random())
        if life == 1:
            kill_postgres(ledger)
        process.send_signal(signal.SIGKILL)
        lines = ["begin", *process.stdout.read().split()]
        process.wait()
        begun, done = begun + lines.count("begin"), done + lines.count("done")
    # The last life sends what is left.
    asyncio.run(drain(tmp_path / "spool", ledger.started.address))
    found = ledger.report(tenant=tenant).total.requests // 10
    assert done <= found <= begun
    assert begun - done <= 3


async def drain(folder, address):
    from router.accounting.ledger_sender import LedgerSender
    from router.accounting.ledger_spool import LedgerSpool

    spool = LedgerSpool(folder, 1 << 30, time.time_ns)
    spool.open()
    sender = LedgerSender(spool, address)
    sender.start()
    await sender.close(600)  # thousands of batches, each a write to the disk
    assert len(spool) == 0
