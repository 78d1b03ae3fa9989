"""Rows of a report: money that adds up, the order of rows, and the statement that cells are summed by."""

import asyncio

import pytest

from services.ledger.reports.prices import PriceBook
from services.ledger.reports.time_range import TimeRange
from services.ledger.reports.usage_report import UsageQuestion, usage_report
from services.ledger.storage.price_table import NO_END_MS, Price
from services.ledger.storage.rollups import MEASURES
from services.ledger.storage.times import DAY_MS, utc
from services.runtime.errors import InvalidArgumentError

# A third of a nano-unit for a microsecond, so that every row has a part to round.
BOOK = PriceBook([Price(name, 0, NO_END_MS, 3_600_000_000 // 3, slots=1) for name in ("cpu", "router")], "EUR")


class Cells:
    """A connection that has these sums in store."""

    def __init__(self, *rows):
        self.rows = rows

    async def fetch(self, sql, *_):
        return self.rows

    async def fetchval(self, sql):
        """Until when weeks are summed."""
        return utc(0)


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


async def test_rows_that_come_in_another_order_than_before_are_compared_with_their_own():
    class Twice(Cells):
        async def fetch(self, sql, *_):
            self.rows, found = (sums("b", compute_us=30), sums("c", compute_us=6), sums("a", compute_us=3)), self.rows
            return found

    cells = Twice(sums("a", compute_us=300), sums("b", compute_us=60), sums("c", compute_us=6))
    rows = (await usage_report(cells, BOOK, question(before=TimeRange(0, 1)))).rows
    assert [(row.tenant, row.cost_nano, row.previous_cost_nano) for row in rows] == [
        ("a", 100, 1),
        ("b", 20, 10),
        ("c", 2, 2),
    ]


async def test_what_was_used_before_alone_is_a_row_too():
    class Twice(Cells):
        async def fetch(self, sql, *_):
            self.rows, found = (sums("gone", compute_us=30, requests=9), sums("a", compute_us=3)), self.rows
            return found

    answer = await usage_report(Twice(sums("a", compute_us=3)), BOOK, question(before=TimeRange(0, 1)))
    assert [(row.tenant, row.requests, row.cost_nano, row.previous_cost_nano) for row in answer.rows] == [
        ("gone", 0, 0, 10),
        ("a", 0, 1, 1),
    ]
    assert (answer.row_count, answer.total.previous_cost_nano) == (2, 11)


async def test_the_last_days_are_shown_in_order_of_time():
    cells = [sums(utc(day * DAY_MS), compute_us=3 * (9 - day)) for day in range(9)]
    asked = UsageQuestion(TimeRange(0, 30 * DAY_MS), ("day",), {}, 3)
    answer = await usage_report(Cells(*reversed(cells)), BOOK, asked)
    assert [row.day for row in answer.rows] == ["1970-01-07", "1970-01-08", "1970-01-09"]
    assert (answer.row_count, answer.total.cost_nano) == (9, 45)


async def test_more_rows_than_a_report_holds_are_refused():
    with pytest.raises(InvalidArgumentError, match="more than 100,000 rows; group by less"):
        await usage_report(Cells(*[sums("t")] * 100_001), BOOK, question())


async def test_a_report_of_many_rows_is_made_beside_the_loop():
    loop = asyncio.get_running_loop()
    cells = [sums(f"t{one}", compute_us=3) for one in range(5000)]
    ticks = 0

    def tick():
        nonlocal ticks
        ticks += 1
        loop.call_soon(tick)

    loop.call_soon(tick)
    answer = await usage_report(Cells(*cells), BOOK, question())
    assert answer.total.cost_nano == 5000
    assert ticks > 1
