"""The inference worker as a process: load the models, serve, drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import onnxruntime

from services.inference.api.control import ModelControl
from services.inference.api.envelope_socket import EnvelopeSocket
from services.inference.api.metrics import WorkerMetrics
from services.inference.api.service import DirectService, EnvelopeService
from services.inference.api.shared_memory_service import SharedMemoryControl
from services.inference.execution.execution import CUDA
from services.inference.execution.loading import load_model
from services.inference.execution.model import OnnxModel
from services.inference.models.decisions import Decisions
from services.inference.models.model_store import ModelStore
from services.inference.repository.crash_journal import CrashJournal
from services.inference.repository.repository import ModelFiles, RepositoryError
from services.inference.repository.snapshots import Snapshots
from services.inference.settings import WorkerSettings
from services.inference.worker import Worker
from services.runtime.machine import cores, memory
from services.runtime.process.process import publish, run, set_title
from services.runtime.redis.discovery import Announcer
from services.runtime.rpc.calls import Calls
from services.runtime.rpc.live_settings import LiveSettings
from services.runtime.rpc.roles import V2
from services.runtime.rpc.server import Server, StartError
from services.runtime.telemetry.gpu_metrics import gpu_metrics
from services.runtime.telemetry.load_report import Answers, LoadReport
from services.runtime.telemetry.metrics import Metrics
from services.runtime.telemetry.supervisor import BACKGROUND
from services.runtime.telemetry.worker_spans import EXECUTE

log = logging.getLogger(__name__)

Kept = TypeVar("Kept")
_FORGOTTEN = "models loaded or unloaded by request are forgotten when this process ends"


async def serve(settings: WorkerSettings, stopping: asyncio.Event) -> None:
    access = settings.access()
    redis = settings.create_discovery()
    executor = ThreadPoolExecutor(thread_name_prefix="onnxruntime")
    journal = _kept(settings, "crashes", CrashJournal, "models that crash this worker are not quarantined")
    store = await _load(settings, executor, journal, suggests=not access.is_closed)
    tracer = settings.create_tracer(settings.worker_id)
    worker = Worker(settings.worker_id, store, settings.shared_memory_prefix)
    control = {
        **ModelControl(store).handlers(),
        **SharedMemoryControl(worker.memory).handlers(),
        **LiveSettings(tracer, lambda model: store.held.find(model, "")).handlers(),
    }
    load = worker.load
    report = LoadReport(lambda: Answers(load.answered, 0), cores.available(), load.metrics)
    envelopes = EnvelopeService(worker, settings.region, settings.zone, settings.weight)
    calls = Calls()
    inference = DirectService(worker, tracer, report, access).service(lambda: server.health.serving, control, calls)

    server = settings.create_server([inference, envelopes.service(calls)], access, calls=calls)
    local = EnvelopeSocket(settings.socket_dir, envelopes.execute, settings.max_message_bytes, calls.counter(EXECUTE))
    metrics = Metrics()
    metrics.add(WorkerMetrics(worker, triton_names=settings.triton_metrics).samples)
    metrics.add(tracer.samples)
    metrics.add(calls.samples)
    metrics.add_slow(gpu_metrics())
    envelopes.socket = await local.start()
    port = envelopes.port = await server.start()
    set_title("worker", settings.address, port)
    exposition = await publish(settings, metrics, tracer.process)
    report.start()
    background = [BACKGROUND.once("readiness", partial(_serve_once_usable, server, store))]
    announcer = None
    if redis is not None:
        address = settings.advertised(port)
        announcer = Announcer(redis, lambda: envelopes.announcement(address))
        announcer.start()
    background.append(BACKGROUND.start("free memory", partial(memory.keep_giving_back, store.shrink)))
    if settings.poll_seconds:
        background.append(BACKGROUND.start("model repository", partial(store.poll, settings.poll_seconds)))
    await stopping.wait()
    for task in background:
        task.cancel()
    worker.accepting = False
    # The worker leaves the ring first, then finishes the requests that it has accepted.
    if announcer is not None:
        await announcer.close()
    await asyncio.gather(server.stop(settings.drain_seconds), local.stop(settings.drain_seconds))
    exposition.close()
    await store.close()
    executor.shutdown()
    if journal is not None:
        journal.close()
    await tracer.close()


async def _serve_once_usable(server: Server, store: ModelStore) -> None:
    """Answers probes of readiness with NOT_SERVING while no model could be loaded, so that a rollout stops.

    Routers do not ask for readiness, so that they list the models that failed.
    """
    if not store.usable.is_set():
        log.error("none of the models could be loaded: health checks answer NOT_SERVING until one is")
        server.health.set_serving(True, but=("", V2))
    await store.usable.wait()
    server.set_serving(True)


def _kept(settings: WorkerSettings, kind: str, open_at: Callable[[Path], Kept], lost: str) -> Kept | None:
    """Opens state that outlives this process and that no other worker uses; None if it cannot be opened."""
    path = settings.state_dir / kind / quote(settings.address, safe=":")
    try:
        return open_at(path)
    except OSError as error:
        log.warning("cannot use %s (%s): %s", path, error.strerror or error, lost)
        return None


def model_opener(settings: WorkerSettings) -> Callable[[ModelFiles], OnnxModel]:
    """Returns a function that opens a model from its files, with the providers of this machine."""
    providers = onnxruntime.get_available_providers()
    if CUDA in providers:
        # Loads CUDA and cuDNN from pip packages if the extra `gpu` installed them.
        onnxruntime.preload_dlls()
    return partial(
        load_model,
        providers=providers,
        intra_op_threads=settings.threads or cores.available(),
        max_batch_rows=settings.max_batch_rows,
        caches=str((settings.state_dir / "engines").absolute()),
    )


async def _load(
    settings: WorkerSettings, executor: ThreadPoolExecutor, journal: CrashJournal | None, *, suggests: bool
) -> ModelStore:
    try:
        snapshots = Snapshots(settings.state_dir / "snapshots")
    except OSError as error:
        raise StartError(f"RINGMESH_STATE_DIR: cannot write to {settings.state_dir}: {error.strerror}") from None
    try:
        source = await asyncio.to_thread(settings.model_source)
        store = ModelStore(
            source,
            model_opener(settings),
            executor,
            memory_limit=settings.model_memory_bytes,
            journal=journal,
            snapshots=snapshots,
            decisions=await asyncio.to_thread(
                _kept, settings, "decisions", partial(Decisions, limit=settings.decisions_bytes), _FORGOTTEN
            ),
            signatures=settings.signatures(),
            suggests=suggests,
        )
        await store.load_all()
    except RepositoryError as error:
        raise StartError(str(error)) from None
    return store


def main() -> None:
    run(WorkerSettings, serve)
