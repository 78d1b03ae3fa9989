"""`make bench`: Ringmesh beside Triton and the floors beneath it, in turn, in one run, as medians.

Needs g++, pkg-config and libnghttp2-dev for the load generator, and fetches Triton from PyPI once. Everything runs on
this machine, the generator too. `--against main` compares this working tree with a branch instead.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from rich.console import Console

from tests.bench import models, peers, report, results, triton
from tests.bench.harness import build_loadgen
from tests.bench.peers import Peer, Server
from tests.bench.results import Results, figures
from tests.bench.workloads import QUICK, WORKLOADS, Workload

ROOT = Path(__file__).parents[2]
console = Console(width=150)


def ringmesh_beside_peers(
    stack: ExitStack, workload: Workload, loadgen: Path, work: Path, body: bytes, *, quick: bool
) -> list[Peer]:
    """Ringmesh and everything it is compared with under this workload, serving."""
    start = stack.enter_context
    repository = work / "models"
    ringmesh = start(peers.ringmesh(results.RINGMESH, loadgen, repository, work / "traces"))
    answer = ringmesh.response_bytes(body)
    found: list[Peer] = [ringmesh]
    if not triton.why_not():
        server = start(triton.serving([workload.model], repository, work / "triton"))
        found.append(Server(results.TRITON, loadgen, server))
    if workload.kind == "hit":
        found.append(start(peers.echo(results.LOW_LEVEL, loadgen, answer)))
    if workload.name == "hit" and not quick:
        found.append(start(peers.echo("echo, asyncio", loadgen, answer, "native")))
        found.append(start(peers.echo("echo, grpc.aio", loadgen, answer, "grpcio")))
        found.append(start(peers.ringmesh("Ringmesh, grpcio", loadgen, repository, work / "traces", engine="grpcio")))
        if shutil.which("redis-benchmark"):
            found.append(start(peers.redis_get("Redis GET", answer)))
    if workload.kind == "miss":
        path = repository / workload.model.name / "1" / "model.onnx"
        found.append(peers.InProcess(results.IN_PROCESS, workload.model, path, batches=False))
        if not quick:
            found.append(peers.InProcess(results.BATCHES, workload.model, path, batches=True))
    if workload.name == "miss":
        found.append(start(peers.echo_behind_envelopes("echo behind envelopes", loadgen, answer)))
    return found


def two_trees(
    stack: ExitStack, workload: Workload, loadgen: Path, work: Path, body: bytes, *, other: Path
) -> list[Peer]:
    """Ringmesh as `make` installed it, and that of another tree, whose packages are at `other`."""
    return [
        stack.enter_context(
            peers.ringmesh(name, loadgen, work / "models", work / f"traces-{number}", packages=packages)
        )
        for number, (name, packages) in enumerate({results.RINGMESH: None, "the other tree": other}.items())
    ]


def measure(
    workload: Workload,
    outstanding: tuple[int, ...],
    start_peers,
    loadgen: Path,
    seconds: float,
    rounds: int,
    found: Results,
) -> None:
    """All peers in turn, `rounds` times, each round from another peer on."""
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory(prefix="ringmesh-bench-") as folder, ExitStack() as stack:
        work = Path(folder)
        models.write(workload.model, work / "models")
        bodies = workload.write_bodies(work / "bodies", rng)
        with bodies.open("rb") as file:
            body = file.read(int.from_bytes(file.read(4), "little"))
        serving = start_peers(stack, workload, loadgen, work, body)
        for turn in range(rounds):
            if workload.kind == "zipf":
                workload.write_bodies(bodies, rng)
            for level in outstanding:
                for peer in (*serving[turn % len(serving) :], *serving[: turn % len(serving)]):
                    before = peer.executed(workload.model.name) if workload.kind == "zipf" else 0
                    measured = peer.measure(workload, bodies, level, seconds)
                    row = found.row(workload, level, peer.name)
                    row.runs.append(measured)
                    if workload.kind == "zipf":
                        row.executions.append((peer.executed(workload.model.name) - before) / measured.distinct)


@contextmanager
def tree_of(revision: str) -> Iterator[Path]:
    """The packages of `revision`, built from a git work tree, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ringmesh-bench-tree-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, revision], cwd=ROOT, check=True)
        try:
            if (compiler := tree / "scripts" / "compile").exists():
                # Before setup.py there was this script, and sources found by themselves what it had compiled.
                subprocess.run([sys.executable, compiler], check=True)
                yield tree
            else:
                packages = Path(folder) / "packages"
                pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
                subprocess.run([*pip, "--target", packages, tree], check=True)
                yield packages
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def machine() -> str:
    """What all this ran on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if "model name" in line), platform.machine())
    revision = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return (
        f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"onnxruntime {onnxruntime.__version__}, Ringmesh {revision.stdout.strip()}, Triton {triton.VERSION}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is taken")
    parser.add_argument("--quick", action="store_true", help="only what the goals need")
    parser.add_argument("--only", action="append", metavar="WORKLOAD", choices=[w.name for w in WORKLOADS])
    parser.add_argument("--against", metavar="REVISION", help="compare with the tree of this revision, and no peers")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and its plots")
    arguments = parser.parse_args()
    quick = arguments.quick or arguments.against is not None

    loadgen = build_loadgen()
    how = f"{arguments.rounds} rounds of {arguments.seconds:g} s"
    console.print(f"{machine()}. {how}.")
    found = Results()
    with ExitStack() as stack:
        if arguments.against:
            start_peers = partial(two_trees, other=stack.enter_context(tree_of(arguments.against)))
        else:
            start_peers = partial(ringmesh_beside_peers, quick=quick)
            if why := triton.why_not():
                console.print(f"no Triton: {why}")
        for workload in WORKLOADS:
            if workload.name in (arguments.only or (QUICK if quick else [w.name for w in WORKLOADS])):
                console.print(f"{workload.name} ...")
                levels = QUICK.get(workload.name, workload.outstanding) if quick else workload.outstanding
                measure(workload, tuple(levels), start_peers, loadgen, arguments.seconds, arguments.rounds, found)
    report.show(console, found, figures(found))
    if arguments.write:
        report.write(ROOT / "docs", machine(), how, found, figures(found))


if __name__ == "__main__":
    main()
