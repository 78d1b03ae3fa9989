"""A Redis Cluster behind routers under load: killed, paused, resharded, and no request fails or is answered wrong."""

import asyncio
import random
import uuid

import grpc
import numpy as np
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from tests import models
from tests.system.redis_servers import needs_redis_server, redis_cluster  # noqa: F401
from tests.system.test_cache import INFER

pytestmark = [needs_redis_server, pytest.mark.proof]


def echo():
    """A request nobody has sent before, of which the answer is known."""
    array = np.frombuffer(uuid.uuid4().bytes, np.uint8).astype(np.float32).reshape(1, 16)
    request = v2.ModelInferRequest(model_name="identity_fp32", raw_input_contents=[array.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=array.shape)
    return request


class Load:
    """Callers that repeat themselves half of the time, on two routers."""

    def __init__(self, routers):
        self.outcomes = dict.fromkeys(("hit-local", "hit-shared", "joined", "miss"), 0)
        self.problems = []
        self._routers = routers
        self._stopping = False
        self._known = [echo() for _ in range(100)]

    async def __aenter__(self):
        self._channels = [grpc.aio.insecure_channel(router.address) for router in self._routers]
        self._callers = [asyncio.create_task(self._call(number)) for number in range(16)]
        return self

    async def __aexit__(self, *_):
        self._stopping = True
        await asyncio.gather(*self._callers)
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def done(self, count, outcome=None):
        """Until so many more are answered."""

        def now():
            return self.outcomes[outcome] if outcome else sum(self.outcomes.values())

        start = now()
        async with asyncio.timeout(120):
            while now() < start + count:
                await asyncio.sleep(0.02)

    async def _call(self, number):
        infer = [channel.unary_unary(INFER) for channel in self._channels]
        rng = random.Random(number)
        while not self._stopping:
            place = rng.randrange(len(self._known))
            if rng.random() < 0.3:
                self._known[place] = echo()
            request = self._known[place]
            call = rng.choice(infer)(request.SerializeToString(), timeout=60)
            try:
                response = v2.ModelInferResponse.FromString(await call)
            except grpc.aio.AioRpcError as error:
                self.problems.append(f"{error.code()}: {error.details()}")
                continue
            if response.raw_output_contents[0] != request.raw_input_contents[0]:
                self.problems.append("a wrong answer")
            self.outcomes[dict(await call.trailing_metadata())["ringmesh-cache"]] += 1


@pytest.fixture
def routers(start_router, start_worker, redis_cluster, tmp_path):  # noqa: F811
    folder = models.identity(tmp_path / "models", "fp32").parent
    # So that Redis is asked however long it takes, and until a node is skipped, it is not asked for long.
    always = 'parameters { key: "ringmesh_shared_tier" value { string_value: "always" } }'
    (folder / "config.pbtxt").write_text(always)
    worker = start_worker("worker", models=tmp_path / "models")
    return [start_router([worker.address], redis_cluster.url, shared_budget_seconds=0.5) for _ in range(2)]


async def test_a_killed_primary_fails_no_request(routers, redis_cluster):  # noqa: F811
    async with Load(routers) as load:
        await load.done(100, "hit-shared")
        killed = redis_cluster.primaries()[0]
        redis_cluster.be_quick_to_fail_over()
        killed.kill()
        async with asyncio.timeout(60):
            while len(await asyncio.to_thread(redis_cluster.primaries)) < 3:
                await asyncio.sleep(0.1)
        await load.done(500)
        killed.start()
        await load.done(100, "hit-shared")
    assert load.problems == []


async def test_a_paused_node_fails_no_request(routers, redis_cluster):  # noqa: F811
    async with Load(routers) as load:
        await load.done(100, "hit-shared")
        paused = redis_cluster.primaries()[0]
        redis_cluster.be_quick_to_fail_over()
        paused.pause()
        await load.done(1000)
        paused.resume()
        await load.done(100, "hit-shared")
    assert load.problems == []


async def test_slots_that_move_fail_no_request(routers, redis_cluster):  # noqa: F811
    source, target = redis_cluster.primaries()[:2]
    ids = [server.cli("cluster", "myid") for server in (source, target)]
    move = ("--cluster-from", ids[0], "--cluster-to", ids[1], "--cluster-slots", "2000", "--cluster-yes")
    async with Load(routers) as load:
        await load.done(100, "hit-shared")
        await asyncio.to_thread(source.cli, "--cluster", "reshard", f"127.0.0.1:{source.port}", *move)
        await load.done(100, "hit-shared")
    assert load.problems == []
