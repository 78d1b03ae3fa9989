"""The inputs that are kept: a file for each target, a line for each input, in base64."""

from base64 import b64decode, b64encode
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"
# Of one target, as lines.
MOST_BYTES = 10_000


def load(name: str) -> list[bytes]:
    file = FOLDER / f"{name}.txt"
    return [b64decode(line) for line in file.read_text().split()] if file.exists() else []


def save(name: str, inputs: Iterable[bytes]) -> None:
    """Keeps the smallest inputs that fit, in order of their size."""
    lines, size = [], 0
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        line = b64encode(data).decode()
        size += len(line) + 1
        if size > MOST_BYTES:
            break
        lines.append(line)
    (FOLDER / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines if line))
