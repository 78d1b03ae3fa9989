"""Sums of roll-ups over a range, by what a report groups them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from services.ledger.reports.periods import Piece
from services.ledger.storage.database import Connection
from services.ledger.storage.rollups import MEASURES

# What a report may group by, as columns of `series`; the day is one of time.
COLUMNS: Final = ("tenant", "model", "version", "region")


class Sums(NamedTuple):
    """Of the cells that have the same group, segment of prices and worker type. `measures` as MEASURES."""

    group: tuple[str, ...]
    segment: int
    worker_type: str
    measures: tuple[int, ...]


def statement(pieces: Iterable[Piece], groups: Sequence[str], filters: Mapping[str, str]) -> tuple[str, list[Any]]:
    """The query and its arguments. `groups` are of COLUMNS or "day"; `filters` are values of COLUMNS."""
    arguments: list[Any] = []
    day = ", date_trunc('day', at, 'UTC') AS day" if "day" in groups else ""
    inner_names = f"segment{', day' if day else ''}, series"
    sums = ", ".join(f"sum({name})::bigint AS {name}" for name in MEASURES)
    parts = []
    for piece in pieces:
        arguments += (_time(piece.from_ms), _time(piece.until_ms))
        end = len(arguments)
        # Summed by series within each piece, so that few rows meet their names.
        parts.append(
            f"SELECT {piece.segment} AS segment{day}, series, {sums} FROM rollup_{piece.grain} "
            f"WHERE at >= ${end - 1} AND at < ${end} GROUP BY {inner_names}"
        )
    wanted = []
    for name, value in filters.items():
        assert name in COLUMNS
        arguments.append(value)
        wanted.append(f"s.{name} = ${len(arguments)}")
    names = ", ".join(
        "to_char(day AT TIME ZONE 'UTC', 'YYYY-MM-DD') AS day" if group == "day" else f"s.{group}" for group in groups
    )
    keys = f"{names}, " if names else ""
    numbers = ", ".join(str(place + 1) for place in range(len(groups) + 2))
    return (
        f"SELECT {keys}segment, s.worker_type, {sums} FROM ({' UNION ALL '.join(parts)}) AS u "
        f"JOIN series s ON s.id = u.series {'WHERE ' + ' AND '.join(wanted) if wanted else ''} GROUP BY {numbers}"
    ), arguments


async def fetch(
    connection: Connection, pieces: Sequence[Piece], groups: Sequence[str], filters: Mapping[str, str]
) -> list[Sums]:
    """In no order."""
    if not pieces:
        return []
    sql, arguments = statement(pieces, groups, filters)
    width = len(groups)
    return [
        Sums(tuple(row[:width]), row[width], row[width + 1], tuple(row[width + 2 :]))
        for row in map(tuple, await connection.fetch(sql, *arguments))
    ]


def _time(at_ms: int) -> datetime:
    return datetime.fromtimestamp(at_ms / 1000, UTC)
