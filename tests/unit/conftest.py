"""On compiled modules, only the tests that import one: for the others that would be the same run again, or nearly.

RINGMESH_TEST_COMPILED=all (`make compiled`) runs those too.
"""

import ast
import functools
import os
from pathlib import Path

from services.runtime.machine import compiled
from setup import compiled_sources
from tests.installation import ROOT


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if not compiled.is_used() or os.environ.get("RINGMESH_TEST_COMPILED") == "all":
        return None
    return True if collection_path.match("test_*.py") and not imports_compiled(collection_path) else None


def imports_compiled(test: Path) -> bool:
    """Whether a compiled module is among what the file imports, by itself or by way of other files of tests."""
    found, to_read = set(), [test]
    while to_read:
        new = imports(to_read.pop()) - found
        if not new.isdisjoint(compiled_modules()):
            return True
        found |= new
        sources = (ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in new if name.startswith("tests."))
        to_read += [source for source in sources if source.is_file()]
    return False


@functools.cache
def compiled_modules() -> set[str]:
    """Their dotted names."""
    return {".".join(source.with_suffix("").parts) for source in compiled_sources()}


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
