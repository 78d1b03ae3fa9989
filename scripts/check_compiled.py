#!/usr/bin/env python3
"""Rejects constructs that behave differently under mypyc than in CPython, in the modules that mypyc compiles.

It uses mypy's types and mypyc's list of differences ("Differences from Python" in its documentation). A line with the
comment `compiled: REASON` is exempt. Prints a line for each finding and exits with 1.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from mypy import build, nodes
from mypy.modulefinder import BuildSource
from mypy.options import Options
from mypy.types import CallableType, Instance, LiteralType, NoneType, TupleType, Type, UnionType, get_proper_type

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from setup import compiled_sources  # noqa: E402

EXEMPTION = "# compiled: "
# Unboxed types lose identity, and the exact type of a subclass.
_UNBOXED = frozenset({"builtins.int", "builtins.float", "builtins.complex"})
_FIXED_WIDTH = frozenset({"i16", "i32", "i64", "u8"})
_FRAME_READERS = frozenset({"locals", "globals", "vars", "_getframe"})
# Unlike Python's, instances of compiled classes cannot be pickled, copied, weakly referenced or inspected.
_MODULES = frozenset({"inspect", "pickle", "copy", "weakref"})
_DESCRIPTOR_METHODS = frozenset({"__get__", "__set__", "__delete__", "__set_name__"})

_DEFINITIONS = (nodes.MypyFile, nodes.FuncDef, nodes.OverloadedFuncDef, nodes.Decorator)
# Attributes of mypy's nodes that point outside the tree.
_REFERENCES = frozenset({"node", "info", "names", "imports", "original_def"})
# Line, column, end line, end column.
Place: TypeAlias = "tuple[int, int, int | None, int | None]"


class Finder(ast.NodeVisitor):
    """Collects (line, message) for the findings of one module, whose expressions have `types`."""

    def __init__(self, types: dict[Place, Type]) -> None:
        self._types = types
        # The enclosing functions of the visited node, each with the class that it is a method of.
        self._functions: list[tuple[str, str]] = []
        self._class = ""
        # Whether `finally` or `with` encloses the visited node, within its function.
        self._cleans_up = False
        self.found: list[tuple[int, str]] = []

    def visit_Compare(self, node: ast.Compare) -> None:
        sides = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, sides, sides[1:], strict=False):
            if isinstance(operator, ast.Is | ast.IsNot) and not (_is_singleton(left) or _is_singleton(right)):
                kind = self._unboxed(left) or self._unboxed(right)
                if kind:
                    self._add(node, f"identity of {kind}: compiled code boxes it anew; compare by value")
        if isinstance(node.left, ast.Name) and node.left.id == "__name__":
            self._add(node, "`__name__` of a compiled module is never '__main__'")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name, arguments = _name(node.func), node.args
        if name == "id" and arguments and (kind := self._unboxed(arguments[0])):
            self._add(node, f"identity of {kind}: compiled code boxes it anew")
        elif name in _FRAME_READERS:
            self._add(node, f"`{name}`: compiled functions have no frame to read")
        elif (
            name == "isinstance"
            and _name(arguments[1]) == "bool"
            and _is_instance(self._type(arguments[0]), "builtins.int")
        ):
            self._add(node, "a bool typed as int is an int once compiled; type it `bool | int`")
        elif name in ("str", "repr") and isinstance(node.func, ast.Name) and arguments:
            self._check_text(arguments[0])
        if self._calls_itself(node.func):
            self._add(node, "recursion: a compiled function overflows the stack without RecursionError; bound it")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        left, right = self._type(node.left), self._type(node.right)
        if _is_instance(left, "builtins.frozenset") and not _is_instance(right, "builtins.frozenset", "builtins.set"):
            self._add(node, "a frozenset and a view make a set, and not the frozenset that its stub says")
        self.generic_visit(node)

    def visit_FormattedValue(self, node: ast.FormattedValue) -> None:
        if node.format_spec is None:
            self._check_text(node.value)
        self.generic_visit(node)

    def _check_text(self, value: ast.expr) -> None:
        if self._unboxed(value) == "a float":
            self._add(value, "text of a float: an int given for it is written 1.0 once compiled; give a format")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._check_import(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._check_import(node, node.module or "")
        for alias in node.names:
            if alias.name in _FIXED_WIDTH:
                self._add(node, f"`{alias.name}` overflows where an int grows")

    def _check_import(self, node: ast.stmt, module: str) -> None:
        if module in _MODULES:
            self._add(node, f"`{module}` does not work on instances or frames of compiled code")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr == "__dict__":
            self._add(node, "`__dict__`: compiled instances have none")
        if isinstance(node.ctx, ast.Load) and isinstance(self._type(node), NoneType):
            self._add(node, "an attribute narrowed to None: a call that sets it meanwhile is a TypeError once compiled")
        if isinstance(node.ctx, ast.Store | ast.Del):
            owner = self._type(node.value)
            if isinstance(owner, CallableType) and owner.is_type_obj():
                self._add(node, "assignment to a class: instances that exist keep the old value once compiled")
            elif isinstance(owner, Instance) and owner.type.fullname == "types.ModuleType":
                self._add(node, "assignment to a module: compiled callers are bound early and do not see it")
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if methods := sorted(_DESCRIPTOR_METHODS & {name for item in node.body if (name := _name(item))}):
            self._add(node, f"`{methods[0]}`: a compiled class cannot be a descriptor")
        outer, self._class = self._class, node.name
        self.generic_visit(node)
        self._class = outer

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._check_handlers(node)
        outer = self._cleans_up, self._class
        self._functions.append((node.name, self._class))
        self._cleans_up, self._class = False, ""
        self.generic_visit(node)
        self._cleans_up, self._class = outer
        self._functions.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def _check_handlers(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        caught: dict[str, str] = {}
        for handler in (node for node in _within(function.body) if isinstance(node, ast.ExceptHandler)):
            self._check_suspended(handler)
            kind = ast.unparse(handler.type) if handler.type is not None else ""
            if handler.name and caught.setdefault(handler.name, kind) != kind:
                self._add(handler, f"`{handler.name}` names two exception types: a TypeError once compiled")

    def _check_suspended(self, handler: ast.ExceptHandler) -> None:
        """A compiled coroutine that is resumed while its caller handles another exception takes that for its own."""
        within = list(_within(handler.body))
        awaits = [node.lineno for node in within if isinstance(node, ast.Await | ast.AsyncWith)]
        for node in within:
            if isinstance(node, ast.Raise) and node.exc is None and awaits and min(awaits) <= node.lineno:
                self._add(node, "`raise` after `await` may raise what another handles; name the exception and raise it")

    def visit_Try(self, node: ast.Try) -> None:
        for awaited in _within(node.finalbody):
            if isinstance(awaited, ast.Await | ast.AsyncWith):
                self._add(awaited, "`await` in `finally`: what is raised after it may be what another handles")
        self._visit_cleaned_up(node, node.finalbody)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> None:
        self._add(node, "`async for`: a cancellation within it can crash the process once compiled")
        self.generic_visit(node)

    def visit_With(self, node: ast.With) -> None:
        self._visit_cleaned_up(node, node.items)

    def _visit_cleaned_up(self, node: ast.Try | ast.With, cleanup: Sequence[ast.AST]) -> None:
        outer, self._cleans_up = self._cleans_up, self._cleans_up or bool(cleanup)
        self.generic_visit(node)
        self._cleans_up = outer

    def visit_Yield(self, node: ast.Yield | ast.YieldFrom) -> None:
        if self._cleans_up:
            self._add(node, "`yield` inside `with` or `finally`: not run where a compiled generator is dropped")
        self.generic_visit(node)

    visit_YieldFrom = visit_Yield

    def _calls_itself(self, callee: ast.expr) -> bool:
        if not self._functions:
            return False
        name, class_name = self._functions[-1]
        if class_name:
            return isinstance(callee, ast.Attribute) and callee.attr == name and _name(callee.value) == "self"
        return isinstance(callee, ast.Name) and callee.id == name

    def _type(self, expression: ast.expr) -> Type | None:
        known = self._types.get(_place(expression))
        return None if known is None else get_proper_type(known)

    def _unboxed(self, expression: ast.expr) -> str:
        """Returns the unboxed type that an expression may have, as text; "" if it has none, or mypy knows none."""
        known = self._type(expression)
        return "" if known is None else next(_unboxed_kinds(known), "")

    def _add(self, node: ast.expr | ast.stmt | ast.ExceptHandler, message: str) -> None:
        self.found.append((node.lineno, message))


def _within(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Yields the nodes of a function, without those of functions in it."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _within([*ast.iter_child_nodes(node)])


def _unboxed_kinds(known: Type) -> Iterator[str]:
    proper = get_proper_type(known)
    if isinstance(proper, LiteralType):
        proper = proper.fallback
    if isinstance(proper, UnionType):
        for item in proper.items:
            yield from _unboxed_kinds(item)
    elif isinstance(proper, TupleType) and proper.partial_fallback.type.fullname == "builtins.tuple":
        yield "a tuple"  # a named one stays an object
    elif isinstance(proper, Instance) and proper.type.fullname in _UNBOXED:
        yield f"{'an' if proper.type.name == 'int' else 'a'} {proper.type.name}"


def _is_instance(known: Type | None, *names: str) -> bool:
    return isinstance(known, Instance) and known.type.fullname in names


def _is_singleton(expression: ast.expr) -> bool:
    return isinstance(expression, ast.Constant) and expression.value in (None, True, False, ...)


def _name(node: ast.AST) -> str:
    """Returns the name of a name, an attribute or a definition; "" for other nodes."""
    for attribute in ("id", "attr", "name"):
        if isinstance(name := getattr(node, attribute, ""), str) and name:
            return name
    return ""


def _place(node: ast.expr) -> Place:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def _nodes(node: object, seen: set[int]) -> Iterator[nodes.Expression]:
    """Yields the expressions below `node`, by reflection: mypy's visitors are compiled and cannot be subclassed."""
    if isinstance(node, list | tuple):
        for item in node:
            yield from _nodes(item, seen)
    if not isinstance(node, nodes.Node) or (isinstance(node, nodes.SymbolNode) and not isinstance(node, _DEFINITIONS)):
        return
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, nodes.Expression):
        yield node
    for name in dir(node):
        if not name.startswith("_") and name not in _REFERENCES:
            try:
                value = getattr(node, name)
            except AttributeError:
                continue
            if not callable(value):
                yield from _nodes(value, seen)


def check(sources: Sequence[tuple[Path, str]]) -> list[str]:
    """Returns a line for each finding in `sources`, as (path, module). Raises SystemExit if mypy rejects them."""
    options = Options()
    options.export_types = options.preserve_asts = options.ignore_missing_imports = True
    # Not the cache of mypy, whose options are others, and which may run at the same time.
    options.incremental, options.cache_dir = False, os.devnull
    options.python_version = sys.version_info[:2]
    built = build.build([BuildSource(str(path), module) for path, module in sources], options)
    if built.errors:
        raise SystemExit("\n".join(built.errors))
    found = []
    for path, module in sources:
        expressions = [e for e in _nodes(built.files[module], set()) if e in built.types]
        finder = Finder({(e.line, e.column, e.end_line, e.end_column): built.types[e] for e in expressions})
        source = path.read_text()
        finder.visit(ast.parse(source))
        lines = source.splitlines()
        found += [f"{path}:{line}: {message}" for line, message in finder.found if EXEMPTION not in lines[line - 1]]
    return found


def main() -> None:
    sources = compiled_sources()
    found = check([(source, ".".join(source.with_suffix("").parts)) for source in sources])
    print("\n".join(found) or f"{len(sources)} compiled modules mean the same when interpreted")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
