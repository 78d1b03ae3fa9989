"""Each construct that compiled code takes otherwise is found, and what only looks like one is not."""

import importlib.util
import re
from pathlib import Path

import pytest

PATH = Path(__file__).parents[4] / "scripts/check_compiled.py"
SPEC = importlib.util.spec_from_file_location("check_compiled", PATH)
check_compiled = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_compiled)

SOURCE = """
import copy  # found: copy
import json
import weakref  # found: weakref
from collections.abc import AsyncIterator
from mypy_extensions import i64  # found: overflows

class Entry:
    worth = 0.0
    place: tuple[int, str] | None = None

    def __get__(self, one: object, other: object) -> None: ...

class Fixed: ...

def identity(one: Entry, other: Entry, number: int, maybe: float | None, anything: object) -> bool:
    a = one.worth is not other.worth  # found: identity of a float
    b = number is 7000  # found: identity of an int
    c = one.place is other.place  # found: identity of a tuple
    d = maybe is anything  # found: identity of a float
    e = id(number) == 1  # found: identity of an int
    f = maybe is None or one is other or one.place is not None
    return a or b or c or d or e or f

def text(ratio: float, count: int, flag: bool) -> str:
    return (
        f"{ratio}"  # found: text of a float
        + str(ratio)  # found: text of a float
        + f"{ratio:g} {count} {flag}" + str(count)
    )

def boolean(value: int, either: object) -> bool:
    return isinstance(value, bool) or isinstance(either, bool)  # found: typed as int

def frames() -> object:
    return locals()  # found: no frame

def handlers(text: str) -> str:
    try:
        return json.loads(text)
    except ValueError as error:
        return str(error)
    except TypeError as error:  # found: names two exception types
        return str(error)
    except KeyError as other:
        return str(other)

async def suspended(gate: object) -> None:
    try:
        pass
    except KeyError:
        await gate  # type: ignore[misc]
        raise  # found: after `await`
    except TypeError:
        if gate:
            raise
        await gate  # type: ignore[misc]
    finally:
        await gate  # type: ignore[misc] # found: in `finally`

def recursive(count: int) -> int:
    return recursive(count - 1) if count else 0  # found: recursion

class Walker:
    def walk(self, other: "Walker") -> None:
        other.walk(self)
        self.walk(other)  # found: recursion
        self.walk(other)  # compiled: for once

Fixed.limit = 1  # type: ignore[attr-defined] # found: assignment to a class
json.loads = json.loads  # found: assignment to a module

def views(names: frozenset[str], by_name: dict[str, int]) -> object:
    return names - by_name.keys(), names - names  # found: a set

def narrowed(entry: Entry) -> bool:
    entry.place = None
    entry.__get__(entry, entry)
    return entry.place is None  # found: narrowed to None

def generator(lock: object):
    try:
        yield 1  # found: dropped
    finally:
        pass
    yield 2

def attributes(entry: Entry) -> dict[str, object]:
    return entry.__dict__  # found: __dict__

async def reads(messages: AsyncIterator[bytes]) -> None:
    async for _ in messages:  # found: async for
        pass

if __name__ == "__main__":  # found: never
    frames()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("checked") / "checked.py"
    path.write_text(SOURCE)
    findings = {}
    for finding in check_compiled.check([(path, "checked")]):
        _, line, message = finding.split(":", 2)
        findings.setdefault(int(line), []).append(message)
    return findings


EXPECTED = {
    number: expected[1]
    for number, line in enumerate(SOURCE.splitlines(), 1)
    if (expected := re.search("# found: (.*)", line))
} | {SOURCE.splitlines().index("class Entry:") + 1: "descriptor"}


@pytest.mark.parametrize("line", sorted(EXPECTED), ids=lambda line: SOURCE.splitlines()[line - 1].strip()[:40])
def test_a_construct_that_differs_when_compiled_is_found(found, line):
    assert any(EXPECTED[line] in message for message in found.get(line, []))


def test_nothing_else_is_found(found):
    assert sorted(found) == sorted(EXPECTED)
