"""`make bench`: what `ringmesh up` starts, beside its router and worker alone, Triton and floors, in turn, in one run.

Needs g++, pkg-config and libnghttp2-dev for the load generator, and fetches Triton from PyPI once. Everything runs on
this machine, the generator too. `--against main` compares this working tree with a branch instead, and exits with 1
where it is worse.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from rich.console import Console

from tests import installation
from tests.bench import models, peers, report, results, triton
from tests.bench.harness import WARM_UP_SECONDS, build_loadgen, count, positive
from tests.bench.peers import InProcess, Peer, Server
from tests.bench.results import Results, differences, figures
from tests.bench.workloads import GUARDED, QUICK, WORKLOADS, Workload
from tests.installation import ROOT

# Two processes of the same code differ slightly for their whole life, so each tree is started several times.
STARTS = 4
START_SECONDS = 20
console = Console(width=150)
StartPeers = Callable[[ExitStack, Workload, Path, Path, bytes], list[Peer]]


def beside_peers(stack: ExitStack, workload: Workload, loadgen: Path, work: Path, body: bytes) -> list[Peer]:
    """Starts Ringmesh and all peers that it is compared with under this workload."""
    start = stack.enter_context
    repository = work / "models"
    up = start(peers.ringmesh_up(results.UP, loadgen, repository, work / "state"))
    found: list[Peer] = [up, start(peers.router_and_worker(results.BARE, loadgen, repository, work / "traces"))]
    if not triton.why_not():
        server = start(triton.serving([workload.model], repository, work / "triton"))
        found.append(Server(results.TRITON, loadgen, server))
    if workload.name == "hit":
        found.append(start(peers.echo(results.ECHO, loadgen, up.response_bytes(body))))
    if workload.name == "miss":
        found.append(start(peers.echo_behind_envelopes(results.ECHO, loadgen, up.response_bytes(body))))
    batches = {"miss-magika": (results.IN_PROCESS, False), "miss-dense": (results.BATCHES, True)}
    if workload.name in batches:
        name, batched = batches[workload.name]
        found.append(InProcess(name, workload.model, repository / workload.model.name / "1" / "model.onnx", batched))
    return found


def two_trees(
    stack: ExitStack, workload: Workload, loadgen: Path, work: Path, body: bytes, *, other: Path
) -> list[Peer]:
    """Starts `ringmesh up` twice: as installed by `make`, and from another tree, whose packages are at `other`."""
    return [
        stack.enter_context(
            peers.ringmesh_up(name, loadgen, work / "models", work / f"state-{number}", packages=packages)
        )
        for number, (name, packages) in enumerate({results.THIS: None, results.OTHER: other}.items())
    ]


def measure(
    workload: Workload,
    outstanding: Sequence[int],
    start_peers: StartPeers,
    loadgen: Path,
    seconds: float,
    rounds: range,
    found: Results,
) -> None:
    """Measures all peers in turn in each of `rounds`; each round begins with a different peer."""
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory(prefix="ringmesh-bench-") as folder, ExitStack() as stack:
        work = Path(folder)
        models.write(workload.model, work / "models")
        bodies = workload.write_bodies(work / "bodies", rng)
        with bodies.open("rb") as file:
            body = file.read(int.from_bytes(file.read(4), "little"))
        serving = start_peers(stack, workload, loadgen, work, body)
        for turn in rounds:
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
def packages_of(revision: str) -> Iterator[Path]:
    """Builds the packages of the folder or git revision `revision`; they are removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="ringmesh-bench-tree-") as folder, ExitStack() as stack:
        tree = Path(revision).absolute()
        if not tree.is_dir():
            tree = Path(folder) / "tree"
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, revision], cwd=ROOT, check=True)
            remove = ["git", "worktree", "remove", "--force", tree]
            stack.callback(subprocess.run, remove, cwd=ROOT, check=True)
        if (compiler := tree / "scripts" / "compile").exists():
            # Trees from before setup.py have this script; their sources find the compiled modules automatically.
            subprocess.run([sys.executable, compiler], check=True)
            yield tree
        else:
            packages = Path(folder) / "packages"
            pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
            subprocess.run([*pip, "--target", packages, tree], check=True)
            yield packages


def machine() -> str:
    """Describes the machine and the versions in use."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if "model name" in line), platform.machine())
    revision = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return (
        f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"onnxruntime {onnxruntime.__version__}, Ringmesh {revision.stdout.strip()}, Triton {triton.VERSION}"
    )


def minutes(plan: Mapping[str, Sequence[int]], each: int, starts: int, seconds: float, rounds: int) -> float:
    """Estimates the duration, with `each` peers under each load."""
    loads = sum(len(levels) for levels in plan.values()) * each * rounds
    return (loads * (seconds + WARM_UP_SECONDS) + len(plan) * starts * each * START_SECONDS / 2) / 60


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=positive, help="of each measurement; 3, against a revision 1")
    parser.add_argument("--rounds", type=count, help="how often each is taken; 3, against a revision 16")
    parser.add_argument("--quick", action="store_true", help="only the main figures")
    parser.add_argument("--only", action="append", metavar="WORKLOAD", choices=[w.name for w in WORKLOADS])
    parser.add_argument("--against", metavar="REVISION", help="compare with this revision or folder, and no peers")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and its plots")
    arguments = parser.parse_args()
    against = arguments.against is not None
    seconds, rounds = arguments.seconds or (1 if against else 3), arguments.rounds or (16 if against else 3)
    levels = {workload.name: workload.outstanding for workload in WORKLOADS}
    chosen = GUARDED if against else QUICK if arguments.quick else levels
    plan = {name: chosen.get(name, levels[name]) for name in levels if name in (arguments.only or chosen)}
    starts = min(STARTS, rounds) if against else 1

    installation.import_compiled()
    loadgen = build_loadgen()
    how = f"{rounds} rounds of {seconds:g} s"
    about = minutes(plan, 2 if against else 4, starts, seconds, rounds)
    console.print(f"{machine()}. {how}, about {about:.0f} minutes.")
    found = Results()
    with ExitStack() as stack:
        start_peers: StartPeers = beside_peers
        if against:
            start_peers = partial(two_trees, other=stack.enter_context(packages_of(arguments.against)))
        elif why := triton.why_not():
            console.print(f"no Triton: {why}")
        for workload in WORKLOADS:
            for start in range(starts) if workload.name in plan else ():
                console.print(f"{workload.name} ...")
                turns = range(rounds * start // starts, rounds * (start + 1) // starts)
                measure(workload, plan[workload.name], start_peers, loadgen, seconds, turns, found)
    if against:
        report.show_differences(console, arguments.against, found)
        sys.exit(any(difference.verdict == "worse" for difference in differences(found)))
    report.show(console, found, figures(found))
    if arguments.write:
        report.write(ROOT / "docs", machine(), how, found, figures(found))


if __name__ == "__main__":
    main()
