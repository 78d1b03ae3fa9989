"""Faults are found, named and located by what a scrape of the router says."""

import asyncio
import json
import signal
import urllib.request

import grpc
import pytest

from tests.system.callers import eventually
from tests.system.processes import free_address, stop
from tests.system.test_cache import fresh
from tests.system.test_metrics import INFER, scrape, value

pytestmark = [pytest.mark.proof, pytest.mark.alone]


@pytest.fixture
def fleet(start_router, start_worker, tmp_path):
    """Two workers, a Redis that is not there, and a router over them with its metrics and its folder of spans."""
    workers = {name: start_worker(name) for name in ("well", "ill")}
    metrics = free_address()
    router = start_router(
        [worker.address for worker in workers.values()],
        f"redis://{free_address()}",
        metrics_address=metrics,
        trace_dir=tmp_path,
        trace_ratio=0,
    )
    yield router, workers, metrics, tmp_path
    workers["ill"].process.send_signal(signal.SIGCONT)


async def load(address, requests):
    """Statuses by name; each request is one that no cache knows."""
    async with grpc.aio.insecure_channel(address) as channel:
        infer = channel.unary_unary(INFER)

        async def ask(request):
            try:
                await infer(request.SerializeToString(), timeout=60)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        return await asyncio.gather(*(ask(request) for request in requests))


async def scraped(metrics):
    return await asyncio.to_thread(scrape, metrics)


def spans(folder):
    # The last line may still be written.
    whole = (file.read_text().rpartition("\n")[0] for file in folder.glob("router-*.jsonl"))
    return [json.loads(line) for text in whole for line in text.splitlines()]


async def test_each_fault_is_told_apart_in_a_scrape(fleet):
    router, workers, metrics, folder = fleet
    bad = fresh()
    bad.inputs[0].name = "z"
    assert set(await load(router.address, [fresh() for _ in range(50)])) == {"OK"}
    assert set(await load(router.address, [bad] * 5)) == {"INVALID_ARGUMENT"}
    now = await scraped(metrics)
    # Redis: skipped, and no caller noticed.
    assert value(now, "ringmesh_redis_breaker_open") == 1
    assert value(now, "ringmesh_cache_failures_total", tier="shared") > 0
    assert value(now, "ringmesh_redis_errors_total", type="lost") > 0
    # Bad input: the callers' fault, by model, and no error of ours.
    assert value(now, "ringmesh_requests_total", code="INVALID_ARGUMENT", model=bad.model_name) == 5
    assert value(now, "ringmesh_errors_total", type="invalid_input", model=bad.model_name) == 5
    assert value(now, "ringmesh_slo_bad_total", objective="availability") == 0
    assert value(now, "ringmesh_ring_member_healthy", worker="ill") == 1

    # A worker that hangs: named, and its requests are answered by the other.
    workers["ill"].process.send_signal(signal.SIGSTOP)
    assert set(await load(router.address, [fresh() for _ in range(40)])) == {"OK"}

    async def is_found():
        return value(await scraped(metrics), "ringmesh_ring_member_healthy", worker="ill") == 0

    await eventually(is_found)
    now = await scraped(metrics)
    assert value(now, "ringmesh_ring_member_healthy", worker="well") == 1
    assert value(now, "ringmesh_attempts_total", worker="ill", code="UNAVAILABLE") > 0
    assert value(now, "ringmesh_attempts_total", worker="well", kind="retry", code="OK") > 0

    # Nobody left: the objective burns.
    workers["ill"].process.send_signal(signal.SIGCONT)
    for worker in workers.values():
        stop(worker)
    assert set(await load(router.address, [fresh() for _ in range(10)])) == {"UNAVAILABLE"}
    now = await scraped(metrics)
    assert value(now, "ringmesh_slo_bad_total", objective="availability") == 10
    ours = [value(now, "ringmesh_errors_total", type=kind) for kind in ("worker_lost", "no_worker")]
    assert sum(ours) == 10
    assert value(now, "ringmesh_slo_burn_rate", objective="availability", window="5m") > 14.4

    # Each of those failures is a trace that says which worker did not answer.
    async with asyncio.timeout(60):
        while sum(span["error"] != "" and span["kind"] == "server" for span in spans(folder)) < 15:
            await asyncio.sleep(0.1)
    failed = [span for span in spans(folder) if span["attributes"].get("error.type") == "UNAVAILABLE"]
    assert {span["service"] for span in failed} == {"ringmesh-router"}


async def test_an_exemplar_leads_from_a_histogram_to_the_trace(fleet):
    router, _, metrics, folder = fleet
    bad = fresh()
    bad.inputs[0].name = "z"
    await load(router.address, [bad])
    request = urllib.request.Request(f"http://{metrics}/metrics", headers={"Accept": "application/openmetrics-text"})
    lines = []
    async with asyncio.timeout(60):
        while not lines:  # traces are retained shortly after the answer
            text = await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=60).read().decode())
            lines = [line for line in text.splitlines() if "trace_id=" in line]
    (line,) = lines
    trace_id = line.split('trace_id="')[1][:32]
    async with asyncio.timeout(60):
        while trace_id not in {span["trace_id"] for span in spans(folder)}:
            await asyncio.sleep(0.1)
