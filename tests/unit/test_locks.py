"""The lock files are what pyproject.toml and constraints.txt ask for, with hashes, and name no registry."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# `ringmesh` is built from ./protos.
SERVER = [text for text in PROJECT["dependencies"] if not text.startswith("ringmesh==")]
WANTED = {"server": SERVER, **PROJECT["optional-dependencies"]}
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")


def locked(extra):
    """Versions by name, of each marker."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "locks" / f"{extra}.txt").read_text().splitlines():
        if not HASH.fullmatch(line):
            requirement = Requirement(line.removesuffix("\\"))
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            found.setdefault(canonicalize_name(requirement.name), set()).add(pin.version)
    return found


def versions():
    lines = (ROOT / "constraints.txt").read_text().split()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_each_extra_has_a_lock():
    assert {file.stem for file in (ROOT / "locks").iterdir()} == WANTED.keys()


@pytest.mark.parametrize("extra", WANTED)
def test_a_lock_has_what_its_extra_asks_for(extra):
    found = locked(extra)
    for text in WANTED[extra]:
        requirement = Requirement(text)
        assert any(map(requirement.specifier.contains, found[canonicalize_name(requirement.name)])), text


@pytest.mark.parametrize("extra", WANTED)
def test_a_lock_has_the_versions_of_the_constraints(extra):
    wanted = versions()
    assert {name: found for name, found in locked(extra).items() if name in wanted and found != {wanted[name]}} == {}


@pytest.mark.parametrize("extra", WANTED)
def test_a_lock_has_what_its_packages_need(extra):
    found = locked(extra)
    for name in found:
        try:
            needed = map(Requirement, requires(name) or ())
        except PackageNotFoundError:  # of another platform or extra
            continue
        for requirement in needed:
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in found, (name, requirement)


@pytest.mark.parametrize("extra", WANTED)
def test_each_line_of_a_lock_is_a_version_or_a_hash(extra):
    text = (ROOT / "locks" / f"{extra}.txt").read_text()
    assert "://" not in text
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        assert HASH.fullmatch(line) or (re.match(r"[a-z0-9-]+==", line) and HASH.fullmatch(following)), line
