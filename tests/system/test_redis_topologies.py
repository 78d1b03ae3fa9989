"""The shared tier on a real Redis Cluster, behind Sentinels, over TLS with ACL users, and on servers that refuse."""

import asyncio
import logging
import random
import subprocess
import time

import pytest
import uvloop

from cache.keys.invalidation import InvalidationLog
from cache.policy.leases import Leases
from cache.tiers.breaker import Breaker
from cache.tiers.entry import Entry, EntryFrames
from cache.tiers.shared_tier import SharedTier, stored_name
from tests.system.conftest import eventually
from tests.system.redis_servers import needs_redis_server, redis_cluster, start_redis  # noqa: F401

pytestmark = needs_redis_server


def create_tier(url, **settings):
    tier = SharedTier(
        url,
        EntryFrames("secret"),
        **{
            "ttl_seconds": 3600,
            "budget_seconds": 2,
            "create_breaker": lambda: Breaker(time.monotonic, first_pause=0.05, longest_pause=0.2),
            **settings,
        },
    )
    tier.start()
    return tier


@pytest.fixture
async def open_tier():
    opened = []

    def create(url, **settings):
        opened.append(create_tier(url, **settings))
        return opened[-1]

    yield create
    for tier in opened:
        await tier.close()


async def keeps(tier, keys, seconds=60.0):
    """Until all of them can be written and found."""
    async with asyncio.timeout(seconds):
        while True:
            found = await asyncio.gather(*(tier.get(key) for key in keys))
            missing = [key for key, entry in zip(keys, found, strict=True) if entry is None]
            if not missing:
                return
            for key in missing:
                tier.put(key, Entry(b"value of " + key, 1))
            await asyncio.sleep(0.02)


KEYS = [b"key-%d" % index for index in range(60)]


@pytest.fixture
def certificate(tmp_path):
    """(key, certificate) for 127.0.0.1."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*make.split(), *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return key, certificate


@pytest.mark.parametrize("create_loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_tls_with_an_acl_user(start_redis, certificate, create_loop):  # noqa: F811
    key, certificate = certificate
    tls = ("--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", certificate)
    acl = ("--user", "mesh", "on", ">s%cret", "~rm1:*", "~{rm1-mesh}:*", "+@all", "--user", "default", "off")
    server = start_redis(*map(str, tls), "--tls-auth-clients", "no", *acl, tls=True)
    url = f"rediss://mesh:s%25cret@127.0.0.1:{server.port}/0?ssl_ca_certs={certificate}"

    async def use():
        tier = create_tier(url)
        await keeps(tier, KEYS)
        large = Entry(random.randbytes(3 << 20), 1)
        tier.put(b"large", large)
        async with asyncio.timeout(60):
            while (found := await tier.get(b"large")) is None:
                await asyncio.sleep(0.01)
        assert found.value == large.value
        stranger = create_tier(url.replace("s%25cret", "wrong"))
        assert await stranger.get(KEYS[0]) is None
        await tier.close()
        await stranger.close()

    with asyncio.Runner(loop_factory=create_loop) as runner:
        runner.run(use())


@pytest.mark.proof
async def test_a_tier_behind_sentinels_follows_a_failover(start_redis, open_tier):  # noqa: F811
    primary = start_redis()
    replica = start_redis("--replicaof", f"127.0.0.1 {primary.port}")
    watch = (
        f"sentinel monitor predictions 127.0.0.1 {primary.port} 1",
        "sentinel down-after-milliseconds predictions 500",
        "sentinel failover-timeout predictions 2000",
    )
    sentinel = start_redis(*watch, sentinel=True)
    for server in (primary, replica, sentinel):
        server.wait()
    tier = open_tier(f"redis+sentinel://127.0.0.1:{sentinel.port}/predictions")
    await keeps(tier, KEYS)
    async with asyncio.timeout(60):
        while "slave0" not in primary.cli("info", "replication") or "num-slaves\n1" not in sentinel.cli(
            "sentinel", "master", "predictions"
        ):
            await asyncio.sleep(0.1)
    primary.kill()
    await keeps(tier, KEYS)
    assert replica.cli("role").startswith("master")


async def test_a_cluster_keeps_entries_on_all_of_its_primaries(redis_cluster, open_tier):  # noqa: F811
    tier = open_tier(redis_cluster.url)
    await keeps(tier, KEYS)
    assert len(tier.nodes.all) == 3
    eventually(lambda: all(int(server.cli("dbsize")) > 5 for server in redis_cluster.servers))


@pytest.mark.proof
@pytest.mark.alone
async def test_purges_and_leases_work_on_a_cluster(redis_cluster, open_tier):  # noqa: F811
    tier, other = open_tier(redis_cluster.url), open_tier(redis_cluster.url)
    await keeps(tier, KEYS)
    await keeps(other, KEYS)
    boards = [InvalidationLog(each, name, 30) for each, name in ((tier, "a"), (other, "b"))]
    for board in boards:
        board.start()
    async with asyncio.timeout(60):
        while (await boards[0].purge(["model:m"]))[1] < 2:
            pass
    assert boards[1].epochs.scopes == boards[0].epochs.scopes
    leases = Leases(tier)
    for key in KEYS:  # on every server
        lease = await leases.take(key, 10_000)
        assert await leases.take(key, 10_000) is None
        assert await leases.fill(key, lease.token, Entry(b"filled", 1), None)
        assert (await other.get(key)).value == b"filled"
    for board in boards:
        await board.close()


@pytest.mark.proof
@pytest.mark.alone
async def test_one_paused_node_of_a_cluster_costs_its_own_keys_only(redis_cluster, open_tier):  # noqa: F811
    tier = open_tier(redis_cluster.url)
    await keeps(tier, KEYS)
    paused = redis_cluster.primaries()[0]
    owner = {key: tier.nodes.owner(stored_name(key)).name.endswith(str(paused.port)) for key in KEYS}
    paused.pause()
    try:
        await asyncio.gather(*(tier.get(key) for key in KEYS))
        found = await asyncio.gather(*(tier.get(key) for key in KEYS))
    finally:
        paused.resume()
    assert all(entry is not None for key, entry in zip(KEYS, found, strict=True) if not owner[key])


@pytest.mark.proof
@pytest.mark.alone
async def test_entries_are_found_while_slots_move(redis_cluster, open_tier):  # noqa: F811
    # How long a look-up may take is not in question here.
    tier = open_tier(redis_cluster.url, budget_seconds=10)
    await keeps(tier, KEYS)
    source, target = redis_cluster.primaries()[:2]
    ids = [server.cli("cluster", "myid") for server in (source, target)]
    move = ("--cluster-from", ids[0], "--cluster-to", ids[1], "--cluster-slots", "3000", "--cluster-yes")
    reshard = asyncio.create_task(
        asyncio.to_thread(source.cli, "--cluster", "reshard", f"127.0.0.1:{source.port}", *move)
    )
    lookups = missed = 0
    while not reshard.done():
        found = await asyncio.gather(*(tier.get(key) for key in KEYS))
        lookups += len(found)
        missed += sum(entry is None for entry in found)
        await asyncio.sleep(0)
    await reshard
    assert lookups > 0
    assert missed < lookups / 100
    await keeps(tier, KEYS)


async def test_a_server_set_to_refuse_writes_is_warned_of(start_redis, open_tier, caplog):  # noqa: F811
    server = start_redis("--maxmemory", "100mb", "--maxmemory-policy", "noeviction")
    server.wait()
    with caplog.at_level(logging.WARNING, "cache.tiers.shared_tier"):
        open_tier(f"redis://127.0.0.1:{server.port}")
        async with asyncio.timeout(60):
            while "allkeys-lru" not in caplog.text:
                await asyncio.sleep(0.02)


async def test_a_read_only_server_is_still_read(start_redis, open_tier):  # noqa: F811
    server = start_redis()
    server.wait()
    tier = open_tier(f"redis://127.0.0.1:{server.port}")
    await keeps(tier, KEYS)
    server.cli("config", "set", "min-replicas-to-write", "0")
    server.cli("replicaof", "127.0.0.1", "1")
    server.cli("config", "set", "replica-serve-stale-data", "yes")
    failures = tier.counters.failures
    tier.put(b"new", Entry(b"value", 1))
    async with asyncio.timeout(60):
        while tier.counters.failures == failures:
            await asyncio.sleep(0.01)
    assert (await tier.get(KEYS[0])).value == b"value of " + KEYS[0]
