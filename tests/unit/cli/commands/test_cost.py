"""`ringmesh cost` and `ringmesh prices` with arguments that are wrong."""

import pytest
from typer.testing import CliRunner

from services.cli.commands.cost import moment
from services.cli.commands.prices import nano
from services.cli.errors import CommandError
from services.cli.main import app


@pytest.mark.parametrize("text", ["1969-12-31", "0001-01-01", "1970-01-01T00:00:00+01:00"])
def test_a_time_before_1970_is_refused(text):
    with pytest.raises(CommandError, match="is before 1970-01-01"):
        moment(text, 0)


@pytest.mark.parametrize("text", ["", "yesterday", "-1h", "1.5h", "1H", "2026-13-01", "1" * 10 + "s"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(CommandError, match="is neither an age"):
        moment(text, 0)


@pytest.mark.parametrize(
    "text", ["", "1e-10", "0.0000000001", "9e999999", "1e999999999999", "NaN", "inf", "9223372037"]
)
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(CommandError, match="is no amount with at most nine decimals"):
        nano(text)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e308", "1e400", "", "some"])
@pytest.mark.parametrize(
    "command",
    [
        "prices set --ledger nowhere:1 cpu 1 --watts",
        "prices set --ledger nowhere:1 cpu 1 --slots",
        "prices set --ledger nowhere:1 cpu 1 --kwh",
        "prices set --ledger nowhere:1 cpu --",
        "budgets set --ledger nowhere:1 --tenant acme --soft",
        "budgets set --ledger nowhere:1 --tenant acme --hard",
        "advice --ledger nowhere:1 --latency",
        "advice --ledger nowhere:1 --memory-price",
        "advice --ledger nowhere:1 --since",
        "cost --ledger nowhere:1 --limit",
        "cost --ledger nowhere:1 --since",
        "cost --ledger nowhere:1 --until",
        "key new app --file /nowhere --role infer --days",
    ],
)
def test_a_number_that_is_none_is_refused_in_words(command, value):
    done = CliRunner().invoke(app, [*command.split(), value])
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert "Invalid value" in done.output or f"{value!r} is n" in done.output


@pytest.mark.parametrize("kind", [["--bill"], ["--forecast"], ["--export", "all.csv"]])
@pytest.mark.parametrize("narrower", [["--tenant", "acme"], ["--by", "model"], ["--changes"], ["--trace", "a" * 32]])
def test_what_is_of_everything_is_not_narrowed_in_silence(kind, narrower):
    done = CliRunner().invoke(app, ["cost", *kind, *narrower])
    assert done.exit_code == 2
    assert f"{narrower[0]} is of reports" in done.output
