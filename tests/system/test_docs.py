"""Every command and example in the documents runs."""

import re
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.main import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("protos/*.md")])
FENCE = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    ((?:make|\.venv/bin/\S+|pip|python) ?[^\n]*)$", re.MULTILINE)


def blocks(kind):
    for document in DOCUMENTS:
        for found, code in FENCE.findall(document.read_text()):
            if found == kind:
                yield pytest.param(code, id=f"{document.name}: {code.strip().splitlines()[0][:40]}")


def commands():
    for document in DOCUMENTS:
        for command in INDENTED.findall(FENCE.sub("", document.read_text())):
            yield pytest.param(command.split("#")[0].strip(), id=f"{document.name}: {command}")


def here(code, stack):
    """The same against the stack under test, in place of the default ports."""
    return code.replace("127.0.0.1:8001", stack.router).replace("127.0.0.1:8010", stack.cache)


@pytest.mark.parametrize("code", list(blocks("sh")))
def test_shell_examples_run(code, stack):
    for line in here(code, stack).strip().splitlines():
        words = shlex.split(line)
        words[0] = words[0].replace(".venv/bin", str(Path(sys.executable).parent))
        if words[0].endswith("/ringmesh"):
            words += ["--state", stack.state]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=180)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip()


@pytest.mark.parametrize("code", list(blocks("python")))
def test_python_examples_run(code, stack):
    done = subprocess.run(
        [sys.executable, "-c", here(code, stack)], capture_output=True, text=True, cwd=ROOT, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", list(commands()))
def test_commands_exist_with_their_options(command):
    words = shlex.split(command)
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], capture_output=True, text=True, cwd=ROOT, timeout=180)
        assert done.returncode == 0, done.stderr
        return
    if words[0] == "pip":
        assert (ROOT / words[-1] / "pyproject.toml").exists()
        return
    binary = Path(sys.executable).parent / Path(words[0]).name
    assert binary.exists()
    if binary.name == "ringmesh":
        # Commands within commands, and arguments, which help does not mind.
        named = takewhile(lambda word: not word.startswith("-"), words[1:])
        help_text = CliRunner().invoke(app, [*named, "--help"], env={"COLUMNS": "200"}).stdout
        for word in words[2:]:
            if word.startswith("--"):
                assert word in help_text


def test_every_setting_is_in_the_table_of_operations():
    from cache.settings import CacheSettings
    from router.settings import RouterSettings
    from services.console.settings import ConsoleSettings
    from services.inference.settings import WorkerSettings
    from services.ledger.settings import LedgerSettings

    table = set(re.findall(r"`RINGMESH_([A-Z_]+)`", (ROOT / "docs/operations.md").read_text()))
    kinds = (CacheSettings, ConsoleSettings, LedgerSettings, RouterSettings, WorkerSettings)
    settings = {name.upper() for kind in kinds for name in kind.model_fields}
    assert settings <= table
    assert table - settings == {"API_KEY", "CONFIG"}
