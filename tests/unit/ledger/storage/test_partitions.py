"""Which partitions a day needs, and which are over."""

from datetime import date

from services.ledger.storage.partitions import Retention, _end_of, _parts


def test_days_and_months_have_partitions_of_their_own():
    names = {name: (str(first), str(end)) for name, _, first, end in _parts(date(2026, 12, 31))}
    assert names == {
        "usage_20261231": ("2026-12-31", "2027-01-01"),
        "rollup_minute_20261231": ("2026-12-31", "2027-01-01"),
        "worker_minute_20261231": ("2026-12-31", "2027-01-01"),
        "key_sample_20261231": ("2026-12-31", "2027-01-01"),
        "batch_digest_20261231": ("2026-12-31", "2027-01-01"),
        "margin_minute_20261231": ("2026-12-31", "2027-01-01"),
        "margin_hour_202612": ("2026-12-01", "2027-01-01"),
        "margin_day_202612": ("2026-12-01", "2027-01-01"),
        "rollup_hour_202612": ("2026-12-01", "2027-01-01"),
        "rollup_day_202612": ("2026-12-01", "2027-01-01"),
        "rollup_week_202612": ("2026-12-01", "2027-01-01"),
        "margin_week_202612": ("2026-12-01", "2027-01-01"),
    }


def test_a_week_is_in_the_month_in_which_it_begins():
    # A Sunday, in a week that began on Thursday the 26th.
    tables = {table: str(first) for _, table, first, _ in _parts(date(2026, 3, 1))}
    assert tables["rollup_day"] == "2026-03-01"
    assert tables["rollup_week"] == tables["margin_week"] == "2026-02-01"


def test_a_day_is_over_on_the_next_and_a_month_with_the_last_week_that_began_in_it():
    for day in (date(2026, 2, 28), date(2026, 12, 31), date(2028, 2, 29)):
        for name, table, _, end in _parts(day):
            if name == f"{table}_{day:%Y%m%d}":
                assert _end_of(name) == end
            else:
                assert 0 <= (_end_of(name) - end).days < 7
                assert _end_of(name).isoweekday() == 4


def test_the_first_day_kept_counts_today():
    kept = Retention(usage=35, minutes=1, rollups=100)
    assert kept.first_minute_day(date(2026, 11, 29)) == date(2026, 11, 29)
    assert kept.first_usage_day(date(2026, 11, 29)) == date(2026, 10, 26)
