"""Commands to copy into a shell, with the scripts of this installation."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def script(name: str) -> str:
    """Returns the script next to the running Python, as `make up` activates no environment; else the one on PATH."""
    beside = Path(sys.executable).parent / name
    return _shown(beside) if beside.exists() else shlex.quote(shutil.which(name) or name)


def python(lines: list[str], then: str = "") -> str:
    """Returns a command that runs the lines with the running Python; the command `then` receives its output."""
    return "\n".join([f"{_shown(Path(sys.executable))} - <<'EOF'{then and ' | '}{then}", *lines, "EOF"])


def trace(trace_id: str, state: Path) -> str:
    """Returns the command that shows a trace written under `state`."""
    folder = "" if state == Path(".ringmesh") else f" --state {shlex.quote(str(state))}"
    return f"{script('ringmesh')} trace {trace_id}{folder}"


def _shown(path: Path) -> str:
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
