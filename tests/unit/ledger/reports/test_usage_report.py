"""Rows of a report: money that adds up, the order of rows, and the statement that cells are summed by."""

import pytest

from services.ledger.reports.prices import PriceBook
from services.ledger.reports.time_range import TimeRange
from services.ledger.reports.usage_report import UsageQuestion, usage_report
from services.ledger.storage.price_table import NO_END_MS, Price
from services.ledger.storage.rollups import MEASURES
from services.ledger.storage.times import DAY_MS

# A third of a nano-unit for a microsecond, so that every row has a part to round.
BOOK = PriceBook([Price(name, 0, NO_END_MS, 3_600_000_000 // 3, slots=1) for name in ("cpu", "router")], "EUR")


class Cells:
    """A connection that has these sums in store."""

    def __init__(self, *rows):
        self.rows = rows

    async def fetch(self, sql, *_):
        return self.rows


def sums(tenant, segment=0, worker_type="cpu", **measures):
    return (tenant, segment, worker_type, *(measures.get(name, 0) for name in MEASURES))


def question(**fields):
    return UsageQuestion(TimeRange(0, 30 * DAY_MS), ("tenant",), {}, 1000, **fields)


async def test_rows_add_up_to_the_total_in_each_kind_of_money():
    cells = [
        sums(f"t{one}", compute_us=3 * one + 1, saved_us=3 * one + 2, error_us=1, requests=one) for one in range(40)
    ]
    answer = await usage_report(Cells(*cells), BOOK, question())
    for name in (*MEASURES, "cost_nano", "saved_nano", "error_nano"):
        assert sum(getattr(row, name) for row in answer.rows) == getattr(answer.total, name)
    # A third is left in each row: 13 of the 40 are rounded up.
    assert answer.total.cost_nano == sum(range(40)) + 13


async def test_cells_of_one_group_are_one_row_whatever_worker_type_they_are_of():
    cells = [sums("t", compute_us=30, requests=1), sums("t", 0, "router", compute_us=60, requests=2)]
    (row,) = (await usage_report(Cells(*cells), BOOK, question())).rows
    assert (row.requests, row.compute_us, row.cost_nano) == (3, 90, 30)
    assert row.cost_per_1000_nano == 10_000


async def test_the_costliest_row_comes_first():
    cells = [sums("low", compute_us=3), sums("high", compute_us=300), sums("none")]
    assert [row.tenant for row in (await usage_report(Cells(*cells), BOOK, question())).rows] == ["high", "low", "none"]


async def test_nothing_was_used():
    answer = await usage_report(Cells(), BOOK, question())
    assert (list(answer.rows), answer.row_count, answer.total.cost_nano) == ([], 0, 0)


@pytest.mark.parametrize("book", [BOOK, PriceBook([], "EUR")], ids=["priced", "unpriced"])
async def test_what_has_no_price_is_named_once(book):
    cells = [sums(f"t{one}", 0, "tpu", compute_us=1) for one in range(3)]
    answer = await usage_report(Cells(*cells), book, question(allow_unpriced=True))
    assert len(answer.warnings) == 1
    assert "'tpu'" in answer.warnings[0]
