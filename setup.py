"""Builds the wheel of the server: mypyc makes C extensions of the modules that are marked, beside their sources.

Without a C compiler or Python's headers the wheel is pure Python, and the build says so. An editable install has no
extensions and runs the sources. See docs/decisions/0021.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

ROOT = Path(__file__).parent
PACKAGES = ("cache", "router", "services")
MARK = "from __future__ import annotations  # compiled by mypyc\n"
# Kept between builds. Relative, because setuptools accepts no absolute paths.
C_FILES = "build/c"


def compiled_sources() -> list[Path]:
    """The marked modules, relative to ROOT."""
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return sorted(file.relative_to(ROOT) for file in files if MARK in file.read_text())


class FastBuild(build_ext):
    """Compiles the changed files of an extension on all cores; setuptools compiles all files, one after the other."""

    def build_extensions(self) -> None:
        """Each link waits for the files compiled before it."""
        import mypyc

        compile_one, link = self.compiler._compile, self.compiler.link_shared_object
        # mypyc leaves a file as it is if its content has not changed.
        common = [__file__, mypyc.__file__, *map(str, Path(C_FILES).glob("*.h"))]
        begun: list[Future[None]] = []

        def compile_changed(target: str, source: str, *arguments: object) -> None:
            if newer_group([source, *common], target):
                compile_one(f"{target}.new", source, *arguments)
                Path(f"{target}.new").replace(target)

        def link_when_compiled(*arguments: object, **more: object) -> None:
            while begun:
                begun.pop().result()
            link(*arguments, **more)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.compiler._compile = lambda *arguments: begun.append(pool.submit(compile_changed, *arguments))
            self.compiler.link_shared_object = link_when_compiled
            super().build_extensions()


def has_compiler() -> bool:
    """Whether C extensions can be built here."""
    command = shlex.split(os.environ.get("CC", sysconfig.get_config_var("CC") or "cc"))
    return bool(command and shutil.which(command[0])) and Path(sysconfig.get_path("include"), "Python.h").exists()


def _build_requirements() -> list[str]:
    """Returns mypyc and all typed imports of the sources, in tested versions: compiled code relies on their types."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    typed = [name for name in project["optional-dependencies"]["dev"] if name.startswith(("mypy>", "types-"))]
    tested = {_name(line): line for line in (ROOT / "constraints.txt").read_text().split()}
    tested["ringmesh"] = f"ringmesh @ {(ROOT / 'protos').as_uri()}"
    return [tested.get(_name(requirement), requirement) for requirement in project["dependencies"] + typed]


def _name(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement)[0].lower().replace("_", "-")


def main() -> None:
    """Entry point of pip, for the build requirements and for the build."""
    compiles = has_compiler()
    extensions = []
    Path("build").mkdir(exist_ok=True)
    with Path("build/lock").open("w") as lock, tempfile.TemporaryDirectory(dir="build") as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if "bdist_wheel" in sys.argv and not compiles:
            print("no C compiler or no Python.h: building a pure wheel, which runs slower", file=sys.stderr)
        elif "bdist_wheel" in sys.argv:
            from mypyc.build import mypycify

            extensions = mypycify(
                [str(source) for source in compiled_sources()],
                opt_level="1",
                debug_level="0",
                multi_file=True,
                target_dir=C_FILES,
                group_name="ringmesh",
            )
            for extension in extensions:
                # mypyc turns warnings into errors, but other compilers have other warnings.
                extension.extra_compile_args = [*extension.extra_compile_args, "-Wno-error"]
        setup(
            setup_requires=_build_requirements() if compiles else [],
            ext_modules=extensions,
            cmdclass={"build_ext": FastBuild},
            options={
                # A new folder each time: from a kept one, setuptools would put deleted modules into the wheel.
                "build": {"build_base": os.path.relpath(folder), "build_temp": "build/objects"},
                "egg_info": {"egg_base": os.path.relpath(folder)},
            },
        )


if __name__ == "__main__":
    main()
