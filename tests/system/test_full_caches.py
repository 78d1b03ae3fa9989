"""A router whose caches are full goes on answering, stays within its memory, and counts what it gave up."""

import contextlib

import numpy as np
import pytest
import tritonclient.grpc as triton

from tests import models
from tests.bench.bodies import write_bodies
from tests.bench.harness import build_loadgen, load, running
from tests.ports import free_port
from tests.system.test_metrics import scrape, value
from tests.valkeys import valkey_server

pytestmark = pytest.mark.proof

LOCAL_TIER_BYTES = 1 << 20
REDIS_BYTES = 16 << 20
# What a storm may leave behind beside the tier: buffers of the allocator, memos of requests, pages of code.
SLACK_BYTES = 64 << 20


@contextlib.contextmanager
def redis(kind):
    """Settings of a router with this Redis."""
    if kind == "no Redis":
        yield {}
        return
    with valkey_server() as server:
        with server.client() as client:
            client.config_set("maxmemory", REDIS_BYTES)
            client.config_set("maxmemory-policy", "allkeys-lru")
        yield {"redis_url": server.connection_url, "key_secret": "of this test"}


@pytest.fixture(scope="module")
def loadgen():
    return build_loadgen()


@pytest.mark.parametrize("kind", ["no Redis", "a full Redis"])
def test_a_storm_of_requests_that_are_never_repeated_is_answered_whole(tmp_path, loadgen, kind):
    repository = tmp_path / "models"
    models.mlp(repository)
    row = np.random.default_rng(0).random((1, 64), dtype=np.float32)
    bodies = write_bodies(tmp_path / "bodies", "mlp", "x", [row])
    worker_port, router_port, metrics = free_port(), free_port(), f"127.0.0.1:{free_port()}"
    settings = {"local_tier_bytes": str(LOCAL_TIER_BYTES), "queue_seconds": "30", "metrics_address": metrics}
    with (
        redis(kind) as shared,
        running(
            "services.inference", port=worker_port, address=f"127.0.0.1:{worker_port}", models=str(repository)
        ) as worker,
        running(
            "router",
            port=router_port,
            address=f"127.0.0.1:{router_port}",
            workers=f"127.0.0.1:{worker_port}",
            **settings,
            **shared,
        ) as router,
    ):

        def storm(stamp, seconds):
            ran = load(
                loadgen, router, bodies, order="one", outstanding=32, seconds=seconds, stamp=stamp, also=[worker]
            )
            assert ran.errors == {}
            assert ran.calls > 100
            return ran.calls

        answered = storm(1, 4)
        resident = router.resident_bytes()
        for stamp in range(2_000_000, 100_000_000, 2_000_000):  # the tier holds some 17,000
            answered += storm(stamp, 4)
            if answered > 40_000:
                break
        told = scrape(metrics)
        assert value(told, "ringmesh_cache_bytes", tier="local") <= LOCAL_TIER_BYTES
        # Each was filed, and what the tier does not hold any more was counted out of it.
        held = value(told, "ringmesh_cache_entries", tier="local")
        assert value(told, "ringmesh_cache_fills_total", tier="local") == answered
        assert value(told, "ringmesh_cache_evictions_total", tier="local") == answered - held > 1000
        assert router.resident_bytes() < resident + SLACK_BYTES
        with triton.InferenceServerClient(f"127.0.0.1:{router_port}") as client:
            x = triton.InferInput("x", [1, 64], "FP32")
            x.set_data_from_numpy(np.full((1, 64), 0.5, np.float32))
            answers = [client.infer("mlp", [x], client_timeout=60).as_numpy("y").tobytes() for _ in range(2)]
        assert answers[0] == answers[1]
