"""On compiled modules, only the tests that reach one: for the others that would be the same run again."""

import ast
import functools
from pathlib import Path

from services.runtime.machine import compiled
from setup import MARK
from tests.installation import ROOT


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if compiled.is_used() and collection_path.match("test_*.py") and not reaches_compiled(collection_path):
        return True
    return None


def reaches_compiled(test: Path) -> bool:
    """Whether a compiled module is among what the file imports, by itself or by way of others."""
    found, to_read = set(), [test]
    while to_read:
        source = to_read.pop()
        if MARK in source.read_text():
            return True
        new = imports(source) - found
        found |= new
        sources = (ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in new)
        to_read += [source for source in sources if source.is_file()]
    return False


@functools.cache
def imports(source: Path) -> set[str]:
    """The dotted names of all modules that it may import."""
    names = set()
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Import):
            names.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update((node.module, *(f"{node.module}.{name.name}" for name in node.names)))
    return names
