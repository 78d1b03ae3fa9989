"""Whom a fleet passes over: a worker that is gone or hangs, and none that is busy."""

import pytest

from router.balancing.member import Listing
from router.membership import fleet
from router.membership.fleet import Fleet
from tests.unit.router.transport.test_worker_client import Worker


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
async def worker(tmp_path):
    made = Worker(tmp_path)
    made.says.accepting = True
    await made.server.start()
    yield made
    await made.server.stop(0)


async def test_a_worker_that_is_busy_keeps_its_requests_until_it_hangs(worker, monkeypatch):
    clock = Clock()
    made = Fleet([Listing(worker.address)], lambda ready: None, clock=clock)
    (member,) = made.view.members.values()
    monkeypatch.setattr(fleet, "POLL_TIMEOUT_SECONDS", 20.0)
    await made.describe(member)
    assert member.healthy
    worker.describes.clear()
    monkeypatch.setattr(fleet, "POLL_TIMEOUT_SECONDS", 0.2)
    await made.describe(member)
    clock.now = fleet.MOST_BUSY_SECONDS - 1
    await made.describe(member)
    assert member.healthy
    member.load.reports += 1  # an answer came: it is busy from now on, and not since then
    clock.now = fleet.MOST_BUSY_SECONDS + 1
    await made.describe(member)
    assert member.healthy
    clock.now += fleet.MOST_BUSY_SECONDS
    await made.describe(member)
    assert not member.healthy
    worker.describes.set()
    monkeypatch.setattr(fleet, "POLL_TIMEOUT_SECONDS", 20.0)
    await made.describe(member)
    assert member.healthy
    made.close()


async def test_a_worker_that_is_gone_is_passed_over_at_once(worker):
    made = Fleet([Listing(worker.address)], lambda ready: None, clock=Clock())
    (member,) = made.view.members.values()
    await made.describe(member)
    assert member.healthy
    await worker.server.stop(0)
    await made.describe(member)
    assert not member.healthy
    made.close()
