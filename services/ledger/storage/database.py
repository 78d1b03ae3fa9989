"""Connections to PostgreSQL: a pool for the primary, and one for reports where a replica is named.

Everything runs in explicit transactions and without prepared statements that outlive them, so that PgBouncer may stand
between in transaction mode.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, TypeAlias

import asyncpg

from services.ledger.storage import migrations
from services.runtime.errors import UnavailableError
from services.runtime.rpc.server import StartError

log = logging.getLogger(__name__)

Connection: TypeAlias = Any
_CONNECT_SECONDS = 5.0
_POOL = 6
# A session that the server ends may leave asyncpg's own state behind: that is its InternalClientError.
FAILURES: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
# A report that takes longer is given up.
REPORT_SECONDS = 30.0
# A transaction that takes longer ends with its session: a server that hangs, or whose host is gone, does not answer a
# cancellation either. A rebuild and an export may take longer.
LONGEST_SECONDS = 60.0
_LONGEST_READING_SECONDS = 10 * REPORT_SECONDS
_LONGEST_EXPORT_SECONDS = 6 * 3600.0
_LONGEST_MIGRATION_SECONDS = 3600.0
# One number for all ledgers of a database: whoever holds it writes.
WRITER_LOCK = 0x52696E67
# And whoever holds this one leases budgets.
_LEASE_LOCK = WRITER_LOCK + 1

# Cells are summed in memory: to sort half a million of them first takes thrice as long. To compile a report's statement
# takes longer than to run it.
READING: Final = (
    "SET LOCAL statement_timeout = {timeout}; SET LOCAL work_mem = '64MB'; SET LOCAL enable_sort = off; "
    "SET LOCAL jit = off"
)


class MissingPartitionError(UnavailableError):
    """A partition that was there is not: somebody dropped it."""


class DataRefusedError(UnavailableError):
    """The database is well, and does not take this: a sum that is too large, for one."""


class Database:
    """`url` is a postgresql:// URL; `replica_url` of a server that follows it, for reports."""

    def __init__(self, url: str, replica_url: str | None) -> None:
        self._url = url
        self._replica_url = replica_url
        self._primary: asyncpg.Pool | None = None
        self._reports: asyncpg.Pool | None = None

    @property
    def is_open(self) -> bool:
        """Whether it was reached, and its schema is ours."""
        return self._reports is not None

    async def open(self) -> None:
        """Connects and migrates. Raises OSError, asyncpg's errors and MigrationError: then it may be tried again.

        Raises StartError where trying again cannot help.
        """
        pool = await self._create_pool(self._url)
        try:
            await _bring_schema(pool, self._url)
            # A pool of their own: however many reports and exports run, a session is left for who writes.
            reports = await self._create_pool(self._replica_url or self._url)
        except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError, ValueError) as error:
            pool.terminate()
            raise StartError(f"cannot use the database: {error}") from None
        except BaseException:
            pool.terminate()
            raise
        self._primary, self._reports = pool, reports

    async def close(self) -> None:
        """Ends all sessions, those at work too."""
        for pool in (self._primary, self._reports):
            if pool is not None:
                pool.terminate()

    @asynccontextmanager
    async def writing(self, longest_seconds: float | None = None) -> AsyncIterator[Connection]:
        """A transaction on the primary that holds the writer's lock: one at a time, over all ledgers.

        `longest_seconds`: None: LONGEST_SECONDS. Raises UnavailableError where the database cannot be reached or fails;
        what was done then is undone, or, where the connection was lost while committing, may be done.
        """
        async with _transaction(self._primary, longest_seconds or LONGEST_SECONDS) as connection:
            await connection.execute(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")
            yield connection

    @asynccontextmanager
    async def leasing(self) -> AsyncIterator[Connection]:
        """A transaction on the primary for leases of budgets: one at a time, beside who writes."""
        async with _transaction(self._primary, LONGEST_SECONDS) as connection:
            await connection.execute(READING.format(timeout=int(REPORT_SECONDS * 1000)))
            await connection.execute(f"SELECT pg_advisory_xact_lock({_LEASE_LOCK})")
            yield connection

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[Connection]:
        async with _transaction(self._primary, LONGEST_SECONDS) as connection:
            yield connection

    @asynccontextmanager
    async def reading(self, seconds: float | None = REPORT_SECONDS) -> AsyncIterator[Connection]:
        """A transaction that sees one state of the database, on the replica where there is one.

        Statements take at most `seconds`, if given.
        """
        longest = _LONGEST_EXPORT_SECONDS if seconds is None else _LONGEST_READING_SECONDS
        async with _transaction(self._reports, longest, isolation="repeatable_read", readonly=True) as connection:
            await connection.execute(READING.format(timeout=int((seconds or 0) * 1000)))
            yield connection

    async def _create_pool(self, url: str) -> asyncpg.Pool:
        return await asyncpg.create_pool(
            url,
            # Made when they are needed: a pool that keeps some logs each attempt while the server is away.
            min_size=0,
            max_size=_POOL,
            timeout=_CONNECT_SECONDS,
            statement_cache_size=0,
            reset=_nothing_to_reset,
            max_inactive_connection_lifetime=60.0,
        )


async def _nothing_to_reset(_: Connection) -> None:
    """Transactions leave nothing behind."""


@asynccontextmanager
async def _transaction(pool: asyncpg.Pool | None, longest_seconds: float, **options: Any) -> AsyncIterator[Connection]:
    if pool is None:
        raise UnavailableError("the ledger's database is not up yet", kind="database")
    with _mapped_errors():
        async with _bounded_transaction(pool, longest_seconds, **options) as connection:
            yield connection


@asynccontextmanager
async def _bounded_transaction(pool: asyncpg.Pool, longest_seconds: float, **options: Any) -> AsyncIterator[Connection]:
    """Raises asyncpg's errors."""
    async with asyncio.timeout(_CONNECT_SECONDS) as wait, pool.acquire() as connection:
        wait.reschedule(None)
        late = asyncio.get_running_loop().call_later(longest_seconds, _give_up, connection, longest_seconds)
        try:
            async with connection.transaction(**options):
                yield connection
        finally:
            late.cancel()


def _give_up(connection: Connection, seconds: float) -> None:
    log.warning("a session with the database is ended: its transaction took longer than %g s", seconds)
    connection.terminate()


@contextmanager
def _mapped_errors() -> Iterator[None]:
    try:
        yield
    except asyncpg.UndefinedTableError as error:
        raise MissingPartitionError(f"a partition is missing: {error}", kind="database") from None
    except asyncpg.CheckViolationError as error:
        if "no partition" not in str(error):
            raise
        raise MissingPartitionError(f"a partition is missing: {error}", kind="database") from None
    except (asyncpg.DataError, asyncpg.ProgramLimitExceededError) as error:
        raise DataRefusedError(str(error), kind="database") from None
    except asyncpg.QueryCanceledError:
        raise UnavailableError("the database took too long; ask for a shorter range", kind="database") from None
    except FAILURES as error:
        raise UnavailableError(
            f"the ledger's database failed: {type(error).__name__}: {error}", kind="database"
        ) from error


async def _bring_schema(pool: asyncpg.Pool, url: str) -> None:
    """Migrates where that is needed, while no other ledger writes or migrates."""
    async with _bounded_transaction(pool, LONGEST_SECONDS) as connection:
        if await _is_ours(connection):
            return
    async with _bounded_transaction(pool, _LONGEST_MIGRATION_SECONDS) as connection:
        async with asyncio.timeout(_LONGEST_MIGRATION_SECONDS):
            await connection.execute(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")
            # Another ledger may have migrated meanwhile.
            if not await _is_ours(connection):
                await migrations.migrate(url)


async def _is_ours(connection: Connection) -> bool:
    """Whether all migrations were applied. Raises StartError where there are others."""
    applied: set[str] = set()
    if await connection.fetchval("SELECT to_regclass('schema_migrations')") is not None:
        applied = {row["version"] for row in await connection.fetch("SELECT version FROM schema_migrations")}
    if newer := sorted(applied - migrations.known()):
        raise StartError(
            f"the database belongs to a newer ledger: this one does not know its migrations {', '.join(newer)}"
        )
    return applied == migrations.known()
