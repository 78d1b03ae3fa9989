"""Reports and the cache that keeps their answers, with a database that counts its sessions."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from ringmesh.cache.v1 import cache_pb2, cache_pb2_grpc
from ringmesh.ledger.v1 import ledger_pb2

from services.ledger.reports import report_cache, reports
from services.ledger.reports.price_list import PriceList
from services.ledger.reports.prices import PriceBook
from services.ledger.reports.report_cache import ReportCache
from services.ledger.reports.reports import Reports
from services.ledger.reports.time_range import TimeRange
from services.ledger.reports.usage_report import UsageQuestion
from services.ledger.storage.partitions import Retention
from services.ledger.storage.times import DAY_MS

ANSWER = ledger_pb2.ReportResponse(currency="EUR", row_count=1)


class Service(cache_pb2_grpc.CacheServiceServicer):
    """Keeps what is put, or refuses it; a put waits for `may_put`, a look-up fails while `fails`."""

    def __init__(self):
        self.entries = {}
        self.gets = 0
        self.fails = self.refuses = False
        self.may_put = asyncio.Event()
        self.may_put.set()

    async def Get(self, request, context):
        self.gets += 1
        if self.fails:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        value = self.entries.get(request.key)
        return cache_pb2.GetResponse(entry=cache_pb2.Entry(value=value) if value is not None else None)

    async def Put(self, request, context):
        await self.may_put.wait()
        if self.refuses:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too large")
        self.entries[request.key] = request.value
        return cache_pb2.PutResponse()


@pytest.fixture
async def service():
    return Service()


@pytest.fixture
async def cache(service, monkeypatch):
    # A busy machine is not slow to answer here.
    monkeypatch.setattr(report_cache, "_GET_SECONDS", 60)
    server = grpc.aio.server()
    cache_pb2_grpc.add_CacheServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    cache = ReportCache(f"127.0.0.1:{port}", "")
    yield cache
    service.may_put.set()
    await cache.close()
    await server.stop(None)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def test_an_answer_that_is_stored_is_found_and_says_so(service, cache):
    assert await cache.get(b"k", ledger_pb2.ReportResponse) is None
    cache.put(b"k", ANSWER, 1)
    await until(lambda: service.entries)
    found = await cache.get(b"k", ledger_pb2.ReportResponse)
    assert (found.row_count, found.cached) == (1, True)


async def test_an_answer_that_the_cache_refuses_costs_no_look_up(service, cache):
    service.refuses = True
    cache.put(b"large", ANSWER, 1)
    await until(lambda: cache.failures)
    service.entries[b"k"] = ANSWER.SerializeToString()
    assert (await cache.get(b"k", ledger_pb2.ReportResponse)).cached


async def test_damaged_bytes_are_not_an_answer_and_cost_no_other_look_up(service, cache):
    service.entries |= {b"damaged": b"\xff", b"k": ANSWER.SerializeToString()}
    assert await cache.get(b"damaged", ledger_pb2.ReportResponse) is None
    assert (await cache.get(b"k", ledger_pb2.ReportResponse)).cached


async def test_a_cache_that_fails_is_not_asked_for_a_while(service, cache):
    service.fails = True
    assert await cache.get(b"k", ledger_pb2.ReportResponse) is None
    assert await cache.get(b"k", ledger_pb2.ReportResponse) is None
    assert service.gets == 1


class Sessions:
    """A database of which nothing is read."""

    def __init__(self):
        self.open = 0

    @asynccontextmanager
    async def reading(self):
        self.open += 1
        yield None
        self.open -= 1


async def test_while_the_cache_is_asked_or_told_no_session_and_no_caller_waits(service, cache, monkeypatch):
    sessions = Sessions()
    asked = []

    class Watched(ReportCache):
        def __init__(self):
            pass

        async def get(self, key, kind):
            asked.append(sessions.open)
            return await cache.get(key, kind)

        put = staticmethod(cache.put)

    async def nothing(*_):
        return b""

    async def book(*_):
        return PriceBook([], "EUR")

    async def answer(*_, **__):
        assert sessions.open == 1
        return ANSWER

    monkeypatch.setattr(report_cache, "versions", nothing)
    monkeypatch.setattr(reports, "usage_report", answer)
    prices = PriceList(sessions, "EUR")
    monkeypatch.setattr(prices, "book", book)
    asking = Reports(sessions, prices, Watched(), Retention(35, 3, 1100), lambda: 10 * DAY_MS / 1000)
    question = UsageQuestion(TimeRange(0, DAY_MS), ("tenant",), {}, 10)
    service.may_put.clear()
    assert not (await asking.usage(question)).cached
    assert not service.entries
    service.may_put.set()
    await until(lambda: service.entries)
    assert (await asking.usage(question)).cached
    assert asked == [0, 0]
