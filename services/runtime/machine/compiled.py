"""Whether this process runs compiled modules, which setup.py puts into the wheel, or their sources.

`python -P -m services.runtime.machine.compiled` exits with 0 if the installed modules are compiled.
"""

from __future__ import annotations

import sys

from services.runtime import wire


def is_used() -> bool:
    """Whether the modules are compiled: either all of them are, or none."""
    return not (wire.__file__ or "").endswith(".py")


if __name__ == "__main__":
    sys.exit(not is_used())
