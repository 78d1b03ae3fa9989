"""Rows in PostgreSQL's binary format."""

import numpy as np
import pytest

from services.ledger.storage import usage_rows


def some_rows(count):
    rows = usage_rows.empty(count)
    usage_rows.set_times(rows, np.arange(count) + 1_796_000_000_000)
    for place, name in enumerate(usage_rows.INTEGERS):
        rows[name] = np.arange(count) * (place + 1)
    return rows


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_what_is_written_is_read_in_whatever_pieces_it_comes(step):
    rows = some_rows(5)
    data = usage_rows.as_copy(rows)
    reader = usage_rows.CopyReader()
    read = np.concatenate([part for at in range(0, len(data), step) for part in reader.feed(data[at : at + step])])
    for name in usage_rows.NAMES:
        assert read[name].tolist() == rows[name].tolist()
    assert usage_rows.times_ms(read).tolist() == [1_796_000_000_000 + number for number in range(5)]


def test_rows_that_numpy_turned_to_this_machines_order_are_not_written():
    with pytest.raises(AssertionError):
        usage_rows.as_copy(np.concatenate([some_rows(1), some_rows(1)]))
