"""Numbers of series, kinds and workers, which records hold instead of names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

from services.ledger.ingest.batch import UsageSeries
from services.ledger.storage.cubes import CUBES
from services.ledger.storage.database import Connection, Database
from services.ledger.storage.kinds import UsageKind

_MOST_REMEMBERED = 200_000


class Margin(NamedTuple):
    """Some of a series' names: those of a cube, and "" for the others."""

    cube: str
    tenant: str
    model: str
    version: str
    region: str
    worker_type: str


def margins(series: UsageSeries) -> list[Margin]:
    """One a cube, in their order."""
    return [
        Margin(
            cube, **{name: value if name in (*kept, "worker_type") else "" for name, value in series._asdict().items()}
        )
        for cube, kept in CUBES.items()
    ]


class WorkerName(NamedTuple):
    """A worker by what it says of itself."""

    worker_id: str
    worker_type: str
    region: str


Name = TypeVar("Name", UsageSeries, Margin, UsageKind, WorkerName)


class Numbers(Generic[Name]):
    """The numbers of one table, whose text columns are the fields of `name_type`; the last used are remembered."""

    def __init__(self, table: str, name_type: type[Name]) -> None:
        fields = name_type._fields
        names = ", ".join(fields)
        arrays = ", ".join(f"${place}::text[]" for place in range(1, len(fields) + 1))
        same = " AND ".join(f"t.{field} = n.{field}" for field in fields)
        self._insert = (
            f"INSERT INTO {table} ({names}) SELECT {names} FROM unnest({arrays}) AS n({names}) "
            f"ON CONFLICT ({names}) DO NOTHING"
        )
        found = ", ".join(f"t.{field}" for field in fields)
        self._select = f"SELECT t.id, {found} FROM {table} t JOIN unnest({arrays}) AS n({names}) ON {same}"
        self._type: type[Name] = name_type
        self._known: OrderedDict[Name, int] = OrderedDict()

    async def of(self, database: Database, names: Iterable[Name]) -> dict[Name, int]:
        """The number of each, new ones written at once: a number that no record uses harms nobody."""
        wanted = set(names)
        if missing := sorted(wanted - self._known.keys()):
            async with database.writing() as connection:
                found = await self._find(connection, missing)
            self._known.update(found)
        numbers = {}
        for name in wanted:
            numbers[name] = self._known[name]
            self._known.move_to_end(name)
        while len(self._known) > _MOST_REMEMBERED:
            self._known.popitem(last=False)
        return numbers

    def forget(self) -> None:
        self._known.clear()

    async def _find(self, connection: Connection, names: list[Name]) -> dict[Name, int]:
        columns = list(zip(*names, strict=True))
        # Found first: an insert that conflicts uses up a number of the sequence.
        found = {self._type(*row[1:]): row[0] for row in await connection.fetch(self._select, *columns)}
        if new := [name for name in names if name not in found]:
            columns = list(zip(*new, strict=True))
            await connection.execute(self._insert, *columns)
            found.update({self._type(*row[1:]): row[0] for row in await connection.fetch(self._select, *columns)})
        return found
