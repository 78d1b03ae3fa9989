"""The semantic tier in a real Redis that searches vectors: what one router found, another answers with."""

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from redis import Redis
from redis.exceptions import RedisError
from ringmesh.cache.v1 import cache_pb2, cache_pb2_grpc

from tests.ports import free_port
from tests.system.conftest import eventually
from tests.system.test_cache import infer, outcome
from tests.system.test_rows import batch
from tests.system.test_semantic import fresh, near

FOLDER = Path(sys.prefix) / "redis_search"
pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(not FOLDER.exists(), reason="no Redis that searches is here: make .venv/redis_search"),
]


@pytest.fixture
def redis(tmp_path):
    """(process, URL)"""
    port = str(free_port())
    command = [FOLDER / "redis-server", "--port", port, "--save", "", "--dir", tmp_path]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(FOLDER)}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*command, "--loadmodule", FOLDER / "redisearch.so"], env=environment, stdout=log)

    def answers():
        with contextlib.suppress(RedisError):
            return Redis(port=int(port)).ping()

    eventually(answers)
    yield server, f"redis://127.0.0.1:{port}"
    server.kill()
    server.wait()


async def test_a_vector_that_one_router_found_is_near_enough_on_another(redis, start_worker, start_router):
    server, url = redis
    worker = start_worker("worker")
    routers = [await asyncio.to_thread(start_router, [worker.address], url, audit_share=0) for _ in range(2)]
    async with contextlib.AsyncExitStack() as opened:
        one, other = [await opened.enter_async_context(grpc.aio.insecure_channel(r.address)) for r in routers]
        async with asyncio.timeout(120):
            while True:  # vectors and answers are written behind
                vector = fresh()
                first, _ = await infer(one, batch(vector, "similar"))
                second, trailing = await infer(other, batch(near(vector, 0.995), "similar"))
                if trailing["ringmesh-cache"] == "hit-semantic":
                    break
        assert trailing["ringmesh-similarity"] == "0.9950"
        assert second.SerializeToString() == first.SerializeToString()
        assert await outcome(other, batch(near(vector, 0.9), "similar")) == "miss"
        await cache_pb2_grpc.CacheServiceStub(one).Purge(cache_pb2.PurgeRequest(model="similar"), timeout=60)
        assert await outcome(other, batch(near(vector, 0.995), "similar")) == "miss"
        # A Redis that ends costs the answers of others, and nothing else.
        server.kill()
        vector = fresh()
        assert await outcome(other, batch(vector, "similar")) == "miss"
        assert await outcome(other, batch(near(vector, 0.995), "similar")) == "hit-semantic"
        assert await outcome(one, batch(near(vector, 0.995), "similar")) == "miss"
