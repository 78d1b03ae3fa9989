"""Which Ringmesh tests run: the sources of this checkout, or what `make` built from them and installed.

Tests in one process import the sources; with RINGMESH_TEST_COMPILED=1 what is installed. Processes that they start by
`python -P` and `ringmesh` run what is installed or, if that was built from other sources, the sources.
"""

import os
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = Path(sysconfig.get_path("platlib"))
PACKAGES = ("cache", "router", "services")


def is_current() -> bool:
    """Whether the modules that are installed are those of this checkout."""
    return _modules(ROOT) == _modules(SITE_PACKAGES)


def is_compiled() -> bool:
    """Whether what is installed is current, and compiled."""
    return is_current() and any((SITE_PACKAGES / "services").rglob("*.so"))


def choose() -> None:
    """For this process and those that it starts; to be called before any module of Ringmesh is imported."""
    if not is_current():
        os.environ["PYTHONPATH"] = str(ROOT)
    if os.environ.get("RINGMESH_TEST_COMPILED"):
        import_compiled()


def import_compiled() -> None:
    """Lets this process import what is installed. Raises SystemExit if that is not compiled from these sources."""
    if not is_compiled():
        sys.exit("what is installed was not built from these sources, or is not compiled; run `make .venv/.installed`")
    # `tests` is found here, all else where it is installed.
    sys.path[:] = [*(path for path in sys.path if path not in ("", str(ROOT))), str(ROOT)]


def _modules(folder: Path) -> dict[Path, bytes]:
    files = (file for package in PACKAGES for file in (folder / package).rglob("*.py"))
    return {file.relative_to(folder): file.read_bytes() for file in files}
