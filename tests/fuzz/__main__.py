"""Coverage-guided fuzzing of everything that reads bytes from outside, each target in a process of its own.

    python -m tests.fuzz --seconds 60                 # each target
    python -m tests.fuzz --seconds 600 config entry   # these
    python -m tests.fuzz --seconds 600 --keep         # and the inputs that reach new code go to tests/fuzz/corpus

Exits with 1 if a target failed; the input is printed in base64, as a line for its file in tests/fuzz/corpus.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz import corpus
from tests.fuzz.readers import TARGETS

LARGEST_INPUT = 4096


def libfuzzer(name: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.fuzz.driver", TARGETS[name].read.__module__, name, *options]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def unpack(inputs: list[bytes], folder: Path) -> Path:
    folder.mkdir()
    for number, data in enumerate(inputs):
        (folder / f"{number:05}").write_bytes(data)
    return folder


def fuzz(name: str, seconds: int, *, keep: bool) -> bool:
    """Whether the target passed."""
    with tempfile.TemporaryDirectory(prefix="ringmesh-fuzz-") as temporary:
        folder = Path(temporary)
        known = [*TARGETS[name].seeds, *corpus.load(name)]
        inputs = unpack(known, folder / "inputs")
        limits = (f"-max_len={LARGEST_INPUT}", "-timeout=20", "-rss_limit_mb=4096", f"-artifact_prefix={folder}/")
        ended = libfuzzer(name, *limits, f"-max_total_time={seconds}", "-print_final_stats=1", str(inputs))
        runs = [line.split()[-1] for line in ended.stderr.splitlines() if "number_of_executed_units" in line]
        coverage = [line for line in ended.stderr.splitlines() if " cov: " in line][-1:]
        print(f"{name}: {runs[0] if runs else '?'} inputs, {coverage[0].strip() if coverage else ''}", flush=True)
        failures = [file for file in folder.iterdir() if file.is_file()]
        if ended.returncode or failures:
            for file in failures:
                print(f"{name}: FAILED with {file.name[:8]}: {b64encode(file.read_bytes()).decode()}")
            print(f"{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}", flush=True)
            return False
        if keep:
            corpus.save(name, [file.read_bytes() for file in inputs.iterdir()])
        return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="target", help=f"{', '.join(TARGETS)}; all without any")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--keep", action="store_true", help="write the smallest inputs that reach new code to the corpus"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - TARGETS.keys():
        parser.error(f"there is no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        names = arguments.targets or list(TARGETS)
        passed = list(pool.map(lambda name: fuzz(name, arguments.seconds, keep=arguments.keep), names))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
