"""Sums of roll-ups over a range, by what a report groups them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, TypeAlias

from services.ledger.reports.periods import Piece, pieces
from services.ledger.storage.cubes import smallest
from services.ledger.storage.database import Connection
from services.ledger.storage.rollups import MEASURES, weeks_until
from services.ledger.storage.times import milliseconds, utc
from services.runtime.errors import InvalidArgumentError

# Values by column, one or several.
Filters: TypeAlias = Mapping[str, str | Sequence[str]]
# What a report may group by, as columns of `series`; the day is one of time.
COLUMNS: Final = ("tenant", "model", "version", "region")
# They are in memory, and all of them share the rounding of the total.
_MOST_ROWS: Final = 100_000


class Sums(NamedTuple):
    """Of the cells that have the same group, segment of prices and worker type. `measures` as MEASURES."""

    group: tuple[str, ...]
    segment: int
    worker_type: str
    measures: tuple[int, ...]


def statement(parts: Iterable[Piece], groups: Sequence[str], filters: Filters) -> tuple[str, list[Any]]:
    """The query and its arguments. `groups` are of COLUMNS or "day"; `filters` of COLUMNS.

    Cells are summed by the number of their series first, and those sums by name: to sum cells by name, or those of each
    piece alone first, takes up to twice as long.
    """
    cube = smallest([*(group for group in groups if group != "day"), *filters])
    tables, series = ("margin", "margin") if cube else ("rollup", "series")
    arguments: list[Any] = []
    wanted = [f"s.cube = '{cube}'"] if cube else []
    for name, value in filters.items():
        assert name in COLUMNS
        arguments.append(value)
        number = len(arguments)
        wanted.append(f"s.{name} = ${number}" if isinstance(value, str) else f"s.{name} = ANY(${number}::text[])")
    filtered = f"AND series IN (SELECT id FROM {series} s WHERE {' AND '.join(wanted)}) " if wanted else ""
    day, truncated = ("day, ", "date_trunc('day', at, 'UTC') AS day, ") if "day" in groups else ("", "")
    names, sums = ", ".join(MEASURES), ", ".join(f"bigint_sum({name}) AS {name}" for name in MEASURES)
    selects = []
    for piece in parts:
        arguments += (utc(piece.from_ms), utc(piece.until_ms))
        end = len(arguments)
        selects.append(
            f"SELECT {piece.segment} AS segment, {truncated}series, {names} FROM {tables}_{piece.grain} "
            f"WHERE at >= ${end - 1} AND at < ${end} {filtered}"
        )
    keys = "".join("day, " if group == "day" else f"s.{group}, " for group in groups)
    numbers = ", ".join(str(place + 1) for place in range(len(groups) + 2))
    return (
        f"SELECT {keys}segment, s.worker_type, {sums} FROM (SELECT segment, {day}series, {sums} "
        f"FROM ({' UNION ALL '.join(selects)}) AS c GROUP BY segment, {day}series) AS u "
        f"JOIN {series} s ON s.id = u.series GROUP BY {numbers} LIMIT {_MOST_ROWS + 1}"
    ), arguments


async def rows(
    connection: Connection, boundaries: Sequence[int], groups: Sequence[str], filters: Filters
) -> Sequence[Any]:
    """Of the segments between `boundaries`, which are multiples of a minute; in no order. Each has its groups, a day as
    its midnight, its segment, its worker type, and MEASURES.

    Raises InvalidArgumentError where they are too many.
    """
    until = 0 if "day" in groups else milliseconds(await weeks_until(connection))
    if not (parts := pieces(boundaries, until)):
        return []
    sql, arguments = statement(parts, groups, filters)
    found: Sequence[Any] = await connection.fetch(sql, *arguments)
    if len(found) > _MOST_ROWS:
        raise InvalidArgumentError(
            f"more than {_MOST_ROWS:,} rows; group by less, ask for a shorter range, or for one tenant or model",
            field="by",
        )
    return found


async def fetch(
    connection: Connection, boundaries: Sequence[int], groups: Sequence[str], filters: Filters
) -> list[Sums]:
    """As `rows`."""
    width = len(groups)
    return [
        Sums(tuple(map(label, row[:width])), row[width], row[width + 1], tuple(row[width + 2 :]))
        for row in map(tuple, await rows(connection, boundaries, groups, filters))
    ]


def label(value: str | datetime) -> str:
    """A group as reports name it."""
    return value if isinstance(value, str) else f"{value:%Y-%m-%d}"
