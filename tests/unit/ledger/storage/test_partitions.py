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
    }


def test_a_partition_is_over_on_the_day_after_its_last():
    for day in (date(2026, 2, 28), date(2026, 12, 31), date(2028, 2, 29)):
        for name, _, _, end in _parts(day):
            assert _end_of(name) == end


def test_the_first_day_kept_counts_today():
    kept = Retention(usage=35, minutes=1, rollups=100)
    assert kept.first_minute_day(date(2026, 11, 29)) == date(2026, 11, 29)
    assert kept.first_usage_day(date(2026, 11, 29)) == date(2026, 10, 26)
