"""Usage records as a file, CSV or Parquet, in parts: never more than some thousand rows are in memory."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator
from enum import Enum
from typing import Any, Final

import numpy as np

from services.ledger.reports.time_range import TimeRange
from services.ledger.storage import usage_rows
from services.ledger.storage.database import Connection, Database
from services.ledger.storage.usage_rows import Rows
from services.runtime.telemetry.supervisor import BACKGROUND

_GROUP_ROWS = 50_000
_PART_BYTES = 1 << 20
_NAMES: Final = ("tenant", "model", "version", "region", "worker_type")
_KINDS: Final = ("outcome", "status")
_NUMBERS: Final = tuple(name for name in usage_rows.INTEGERS if name not in ("sequence", "producer", "series", "kind"))


class Format(Enum):
    """Of a file."""

    CSV = "csv"
    PARQUET = "parquet"


async def export(database: Database, range_: TimeRange, form: Format) -> AsyncGenerator[bytes, None]:
    """The parts of the file, in order of time. Cancelled: the query ends."""
    # Two groups at most wait for who reads them.
    groups: asyncio.Queue[Rows | None] = asyncio.Queue(2)
    async with database.reading(seconds=None) as connection:
        writer = await asyncio.to_thread(_Writer, form, *await _names(connection))
        reading = asyncio.create_task(_read(connection, range_, groups))
        try:
            while (rows := await groups.get()) is not None:
                for part in _parts(await asyncio.to_thread(writer.write, rows)):
                    yield part
            await reading
            for part in _parts(await asyncio.to_thread(writer.close)):
                yield part
        finally:
            await BACKGROUND.end(reading)


async def _read(connection: Connection, range_: TimeRange, groups: asyncio.Queue[Rows | None]) -> None:
    reader = usage_rows.CopyReader()
    waiting: list[Rows] = []

    async def take(piece: bytes) -> None:
        waiting.extend(reader.feed(piece))
        if sum(map(len, waiting)) >= _GROUP_ROWS:
            await groups.put(np.concatenate(waiting))
            waiting.clear()

    try:
        begin, end = (at.isoformat() for at in range_.times)
        # Literals, for COPY takes no parameters; both were made of integers.
        query = f"SELECT {', '.join(usage_rows.NAMES)} FROM usage WHERE at >= '{begin}' AND at < '{end}' ORDER BY at"
        await connection.copy_from_query(query, output=take, format="binary")
        if waiting:
            await groups.put(np.concatenate(waiting))
    finally:
        await groups.put(None)


async def _names(connection: Connection) -> tuple[dict[int, tuple[str, ...]], dict[int, tuple[str, ...]]]:
    """Series and kinds by number."""
    series = await connection.fetch(f"SELECT id, {', '.join(_NAMES)} FROM series")
    kinds = await connection.fetch(f"SELECT id, {', '.join(_KINDS)} FROM kind")
    return {row[0]: tuple(row)[1:] for row in series}, {row[0]: tuple(row)[1:] for row in kinds}


class _Writer:
    """Turns rows into bytes of the file; on a thread."""

    def __init__(self, form: Format, series: dict[int, tuple[str, ...]], kinds: dict[int, tuple[str, ...]]) -> None:
        # Slow to import, and only needed here.
        import pyarrow as pa
        from pyarrow import csv, parquet

        self._pa: Any = pa
        self._series = series
        self._kinds = kinds
        text = pa.dictionary(pa.int32(), pa.string())
        self._text = text
        fields = [pa.field("at", pa.timestamp("ms", tz="UTC"))]
        # In CSV, a dictionary is its values.
        fields += [pa.field(name, text if form is Format.PARQUET else pa.string()) for name in (*_NAMES, *_KINDS)]
        fields += [pa.field(name, pa.int64()) for name in _NUMBERS] + [pa.field("trace_id", pa.string())]
        self._schema = pa.schema(fields)
        self._sink = _Sink()
        self._file: Any = (
            parquet.ParquetWriter(self._sink, self._schema, compression="zstd")
            if form is Format.PARQUET
            else csv.CSVWriter(self._sink, self._schema)
        )

    def write(self, rows: Rows) -> bytes:
        """What the file grows by."""
        pa = self._pa
        columns = [pa.array(usage_rows.times_ms(rows), pa.timestamp("ms", tz="UTC"))]
        columns += self._labels(rows["series"], self._series, len(_NAMES))
        columns += self._labels(rows["kind"], self._kinds, len(_KINDS))
        columns += [pa.array(rows[name].astype(np.int64)) for name in _NUMBERS]
        columns.append(pa.array([_trace(trace) for trace in rows["trace_id"].tolist()], pa.string()))
        arrays = [
            array.cast(field.type) if array.type != field.type else array
            for array, field in zip(columns, self._schema, strict=True)
        ]
        self._file.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        return self._sink.taken()

    def close(self) -> bytes:
        """The end of the file."""
        self._file.close()
        return self._sink.taken()

    def _labels(self, numbers: np.ndarray[Any, Any], names: dict[int, tuple[str, ...]], width: int) -> list[Any]:
        """Columns of text, from the numbers that stand for them."""
        found, places = np.unique(numbers.astype(np.int64), return_inverse=True)
        values = [names.get(int(number), ("",) * width) for number in found]
        pa = self._pa
        return [
            pa.DictionaryArray.from_arrays(
                places.astype(np.int32), pa.array([value[place] for value in values], pa.string())
            )
            for place in range(width)
        ]


class _Sink(io.RawIOBase):
    """A file that is taken away while it grows: it knows how long it is, which Parquet's footer needs."""

    def __init__(self) -> None:
        super().__init__()
        self._written = bytearray()
        self._length = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._written += data
        self._length += len(data)
        return len(data)

    def tell(self) -> int:
        return self._length

    def close(self) -> None:
        """Only what is taken is gone."""

    def taken(self) -> bytes:
        """What was written since the last time."""
        written = bytes(self._written)
        self._written.clear()
        return written


def _trace(trace: bytes) -> str:
    return "" if trace == usage_rows.NO_TRACE else bytes(trace).hex()


def _parts(data: bytes) -> list[bytes]:
    return [data[start : start + _PART_BYTES] for start in range(0, len(data), _PART_BYTES)]
