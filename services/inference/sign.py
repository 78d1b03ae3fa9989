"""`python -m services.inference.sign REPOSITORY KEY`: signs each version that a worker would serve."""

from __future__ import annotations

import sys
from pathlib import Path

from services.inference.repository.repository import Directory, RepositoryError, versions
from services.inference.repository.signatures import SigningKeyError, sign


def main() -> int:
    """Prints the files that it wrote; 2 if the repository or the key cannot be used."""
    repository, key = map(Path, sys.argv[1:])
    try:
        for name in Directory(repository).names():
            for files in versions(repository, name):
                print(sign(files, key))
    except (OSError, RepositoryError, SigningKeyError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
