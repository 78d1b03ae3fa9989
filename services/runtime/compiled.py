"""The path of a request, compiled: the same modules as C extensions, made by `scripts/compile` with mypyc.

They are found by a hash of their sources, so what was compiled before a change is never run after it: then, and where
there is no C compiler, the sources run as they are, at a half to two thirds of the speed. See docs/decisions/0021.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
FOLDER = Path(sys.prefix) / "ringmesh-compiled"
# All that MODULES may import of ours: compiled code relies on the types that stand there.
_PACKAGES = ("router", "cache", "services/runtime", "services/inference")
# Nothing that runs long but in NumPy, as strings in a tensor may: compiled code does not let go of the GIL by itself.
MODULES = (
    "cache.breaker",
    "cache.cache_control",
    "cache.doorkeeper",
    "cache.entry",
    "cache.epochs",
    "cache.evictions",
    "cache.freshness",
    "cache.keys",
    "cache.local_tier",
    "cache.mesh",
    "cache.redis_connection",
    "cache.redis_node",
    "cache.refusals",
    "cache.request_memo",
    "cache.shared_tier",
    "router.admission.caller",
    "router.admission.concurrency_limit",
    "router.admission.quotas",
    "router.admission.token_bucket",
    "router.admitted",
    "router.attempt_span",
    "router.audit",
    "router.catalog",
    "router.channels",
    "router.dispatch",
    "router.dispatch_metrics",
    "router.dispatcher",
    "router.fleet",
    "router.grpc_channel",
    "router.http2",
    "router.load",
    "router.local_channel",
    "router.local_connection",
    "router.member",
    "router.miss",
    "router.outliers",
    "router.picker",
    "router.replies",
    "router.request_metrics",
    "router.request_span",
    "router.retry_budget",
    "router.ring",
    "router.service",
    "router.slow_start",
    "router.tail_latency",
    "router.worker_link",
    "services.inference.batcher",
    "services.inference.envelope_socket",
    "services.inference.held_models",
    "services.inference.inline_runs",
    "services.inference.load",
    "services.inference.request",
    "services.inference.request_decoder",
    "services.inference.request_queue",
    "services.inference.returning_callers",
    "services.inference.service",
    "services.inference.statistics",
    "services.inference.tensor_spec",
    "services.inference.work_results",
    "services.inference.worker",
    "services.runtime.backlog",
    "services.runtime.completion",
    "services.runtime.fast_lane",
    "services.runtime.frames",
    "services.runtime.infer_request",
    "services.runtime.load_report",
    "services.runtime.metrics",
    "services.runtime.protocol",
    "services.runtime.recent",
    "services.runtime.request_check",
    "services.runtime.request_limits",
    "services.runtime.rpc",
    "services.runtime.single_flight",
    "services.runtime.spans",
    "services.runtime.tracing",
    "services.runtime.w3c",
    "services.runtime.wire",
    "services.runtime.worker_spans",
)


class _Finder(MetaPathFinder):
    def __init__(self, folder: Path) -> None:
        files = {file.relative_to(folder): str(file) for file in folder.rglob("*.so")}
        self._files = {".".join(path.parts).partition(".cpython-")[0]: file for path, file in files.items()}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self._files.get(fullname)
        return None if file is None else spec_from_file_location(fullname, file)


def sources() -> list[Path]:
    """Of MODULES, relative to ROOT."""
    return [Path(*module.split(".")).with_suffix(".py") for module in MODULES]


def folder() -> Path:
    """Where the modules are, or would be, compiled from the sources that are here, for this Python."""
    read = hashlib.sha256(sys.version.encode())
    for package in _PACKAGES:
        for source in sorted((ROOT / package).rglob("*.py")):
            read.update(source.read_bytes())
    return FOLDER / read.hexdigest()[:16]


def use() -> None:
    """From now on they are imported, if they are there. To be called before any of MODULES is imported."""
    found = folder()
    if found.is_dir():
        sys.meta_path.insert(0, _Finder(found))


def is_used() -> bool:
    """Whether this process runs them."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


if __name__ == "__main__":
    sys.exit(not folder().is_dir())
