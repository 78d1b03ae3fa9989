"""The bench runs end to end, and what it stands on of the product has not changed beneath it."""

import shutil
import sys

import pytest

from tests.bench import __main__ as bench
from tests.bench import peers
from tests.bench.peers import ROOT


def test_an_echo_answers_as_many_bytes_as_it_was_told(tmp_path):
    with peers.echo("echo", tmp_path, 100) as echo:
        assert echo.response_bytes(b"any") == 100


def test_an_echo_behind_envelopes_answers_too(tmp_path):
    with peers.echo_behind_envelopes("echo", tmp_path, 100) as echo:
        assert echo.response_bytes(b"any") == 100


@pytest.mark.proof  # it needs the load generator, and brings up two stacks
def test_two_trees_are_compared_each_by_what_ringmesh_up_starts_from_it(tmp_path, monkeypatch, capsys):
    other = tmp_path / "tree"
    for package in ("router", "cache", "services"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    started = tmp_path / "started"
    with (other / "router" / "main.py").open("a") as main:
        main.write(f"\n__import__('pathlib').Path({str(started)!r}).touch()\n")
    arguments = ("--against", str(other), "--only", "hit", "--rounds", "1", "--seconds", "1")
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    monkeypatch.setattr(bench, "compile_tree", lambda tree: None)  # it takes a minute, and one of both has been
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert not ended.value.code
    assert capsys.readouterr().out.count("too few rounds") == 3
    assert started.exists()
