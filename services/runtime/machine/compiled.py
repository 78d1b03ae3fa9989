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

ROOT = Path(__file__).parents[3]
FOLDER = Path(sys.prefix) / "ringmesh-compiled"
# All that MODULES may import of ours: compiled code relies on the types that stand there.
_PACKAGES = ("router", "cache", "services/runtime", "services/inference")
# Nothing that runs long but in NumPy, as strings in a tensor may: compiled code does not let go of the GIL by itself.
MODULES = (
    "cache.keys.epochs",
    "cache.keys.keys",
    "cache.keys.request_memo",
    "cache.mesh",
    "cache.policy.cache_control",
    "cache.policy.doorkeeper",
    "cache.policy.freshness",
    "cache.policy.refusals",
    "cache.tiers.entry",
    "cache.tiers.evictions",
    "cache.tiers.local_tier",
    "router.accounting.dispatch_metrics",
    "router.accounting.request_metrics",
    "router.accounting.request_span",
    "router.admission.caller",
    "router.admission.concurrency_limit",
    "router.admission.quotas",
    "router.admission.token_bucket",
    "router.balancing.catalog",
    "router.balancing.member",
    "router.balancing.picker",
    "router.balancing.pool",
    "router.balancing.ring",
    "router.balancing.view",
    "router.dispatch.attempt_span",
    "router.dispatch.attempts",
    "router.dispatch.dispatcher",
    "router.dispatch.retry_budget",
    "router.dispatch.tail_latency",
    "router.membership.fleet",
    "router.membership.outliers",
    "router.membership.slow_start",
    "router.request.audit",
    "router.request.call",
    "router.request.miss",
    "router.request.replies",
    "router.request.service",
    "router.transport.channels",
    "router.transport.grpc_channel",
    "router.transport.http2",
    "router.transport.local_channel",
    "router.transport.local_connection",
    "router.transport.worker_client",
    "router.transport.worker_load",
    "services.inference.api.envelope_socket",
    "services.inference.api.service",
    "services.inference.codec.request",
    "services.inference.codec.request_decoder",
    "services.inference.codec.tensor_spec",
    "services.inference.execution.inline_runs",
    "services.inference.models.held_models",
    "services.inference.scheduling.batcher",
    "services.inference.scheduling.load",
    "services.inference.scheduling.request_queue",
    "services.inference.scheduling.returning_callers",
    "services.inference.scheduling.statistics",
    "services.inference.work_results",
    "services.inference.worker",
    "services.runtime.frames",
    "services.runtime.oip.infer_request",
    "services.runtime.oip.protocol",
    "services.runtime.oip.request_check",
    "services.runtime.request_limits",
    "services.runtime.rpc.backlog",
    "services.runtime.rpc.fast_lane",
    "services.runtime.rpc.rpc",
    "services.runtime.single_flight",
    "services.runtime.telemetry.load_report",
    "services.runtime.telemetry.metrics",
    "services.runtime.telemetry.recent",
    "services.runtime.telemetry.spans",
    "services.runtime.telemetry.tracing",
    "services.runtime.telemetry.worker_spans",
    "services.runtime.w3c",
    "services.runtime.wire",
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
