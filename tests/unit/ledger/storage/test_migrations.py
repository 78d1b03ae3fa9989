"""Migrations as files: linted, and each goes back."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from services.ledger.storage.migrations import FOLDER

MIGRATIONS = sorted(FOLDER.glob("*.sql"))
# dbmate runs each in a transaction, so none is left halfway; a table that was just made locks nobody.
EXCLUDED = (
    "prefer-robust-stmts,require-timeout-settings,prefer-bigint-over-int,prefer-bigint-over-smallint,prefer-identity"
)


@pytest.mark.parametrize("path", MIGRATIONS, ids=lambda path: path.stem)
def test_squawk_finds_nothing_in_what_goes_forward(path, tmp_path):
    squawk = shutil.which("squawk", path=str(Path(sys.executable).parent))
    up = tmp_path / path.name
    up.write_text(path.read_text().partition("-- migrate:down")[0])
    done = subprocess.run(
        [squawk, "--assume-in-transaction", "--exclude", EXCLUDED, str(up)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MIGRATIONS, ids=lambda path: path.stem)
def test_each_goes_back(path):
    _, _, down = path.read_text().partition("-- migrate:down")
    assert down.strip()
