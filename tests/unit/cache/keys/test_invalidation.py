"""What processes hear of each other's purges, over a Redis in this process."""

import asyncio
import random
import time

import pytest

from cache.keys import invalidation
from cache.keys.invalidation import _PURGE, EPOCHS, InvalidationLog
from services.runtime.errors import ResourceExhaustedError, UnavailableError
from tests.simulation.redis import Redis


class Shared:
    """A shared tier of which only the board's scripts are used."""

    def __init__(self, redis):
        self._redis = redis

    async def run(self, name, seconds, command, *arguments):
        await asyncio.sleep(0)
        return self._redis.run(command.lower(), arguments)


def boards():
    shared = Shared(Redis(None, random.Random(0), None))
    return InvalidationLog(shared, "a", 30.0), InvalidationLog(shared, "b", 30.0)


async def test_a_process_that_purges_hears_what_others_purged_just_before():
    first, second = boards()
    first.start()
    await second.announce("models")  # both are known, and this one does not beat by itself
    purging = asyncio.create_task(first.purge(["model:x"]))
    while not first.epochs.scopes.get("model:x"):
        await asyncio.sleep(0)
    await asyncio.wait_for(second.purge(["model:y"]), 60)
    await asyncio.wait_for(purging, 60)
    assert second.epochs.scopes["model:x"] == first.epochs.scopes["model:x"]
    await first.close()


async def test_a_purge_of_its_own_confirms_no_news_that_a_process_is_still_told():
    first, second = boards()
    second.start()
    await first.announce("models")
    acted, act = asyncio.Event(), asyncio.Event()

    async def on_news(news):
        acted.set()
        await act.wait()
        return True

    second.on_news = on_news
    announcing = asyncio.create_task(first.announce("models"))
    await acted.wait()
    purging = asyncio.create_task(second.purge(["model:y"]))
    for _ in range(1000):
        await asyncio.sleep(0)
    assert not announcing.done()
    act.set()
    first.start()
    await asyncio.wait_for(asyncio.gather(announcing, purging), 60)
    await first.close()
    await second.close()


@pytest.mark.parametrize("own", ["models", "all"])
async def test_an_announcement_of_its_own_hides_none_of_another_process(own):
    first, second = boards()
    await second.announce("models")
    heard = set()

    async def on_news(news):
        heard.update(news)
        return True

    first.start()
    second.on_news = on_news
    announcing = asyncio.create_task(first.announce("models"))
    while first.epochs.scopes.get("models") == second.epochs.scopes["models"] or not first.epochs.scopes:
        await asyncio.sleep(0)
    await asyncio.wait_for(second.announce(own), 60)
    await asyncio.wait_for(announcing, 60)
    assert own in heard
    await first.close()


async def test_news_that_could_not_be_acted_on_are_told_again():
    first, second = boards()
    await second.announce("models")
    heard = []

    async def on_news(news):
        heard.append(news)
        if len(heard) == 1:
            raise RuntimeError("a worker that cannot be asked")
        return True

    second.on_news = on_news
    await first._run(_PURGE, "1", "1000", "models")
    with pytest.raises(RuntimeError):
        await second._send_heartbeat()
    await second._send_heartbeat()
    assert heard == [{"models"}, {"models"}]


async def test_a_purge_waits_for_a_process_that_cannot_act_on_news_yet_and_does_not_fail():
    first, second = boards()
    can_act = asyncio.Event()
    asked = asyncio.Event()

    async def on_news(news):
        asked.set()
        return can_act.is_set()

    first.on_news = on_news
    second.start()
    first.start()
    purging = asyncio.create_task(first.purge(["all"]))
    await asked.wait()
    for _ in range(1000):
        await asyncio.sleep(0)
    assert not purging.done()
    assert first.oldest_ms == 0
    can_act.set()
    assert (await asyncio.wait_for(purging, 60))[1] == 2
    await first.close()
    await second.close()


async def test_a_purge_waits_for_those_that_redis_has_forgotten_while_it_was_asked_to_write_the_purge():
    redis = Redis(None, random.Random(0), None)

    class Restarted(Shared):
        async def run(self, name, seconds, command, script, *arguments):
            if script == _PURGE:
                await asyncio.sleep(invalidation._SETTLE_SECONDS)
                redis.data.clear()
            return await super().run(name, seconds, command, script, *arguments)

    first, second = InvalidationLog(Restarted(redis), "a", 30.0), InvalidationLog(Shared(redis), "b", 30.0)
    second.start()
    _, confirmed = await asyncio.wait_for(first.purge(["model:x"]), 60)
    assert (confirmed, second.epochs.scopes) == (2, first.epochs.scopes)
    await second.close()


async def test_a_purge_waits_for_those_that_redis_has_forgotten_since_it_was_written():
    redis = Redis(None, random.Random(0), None)

    class Emptied(Shared):
        until = 0.0

        async def run(self, name, seconds, command, script, *arguments):
            if script == _PURGE:
                self.until = time.monotonic() + invalidation._SETTLE_SECONDS
            elif script == invalidation._MEMBERS_NOW and self.until and time.monotonic() >= self.until:
                self.until = 0.0
                redis.data.clear()
            return await super().run(name, seconds, command, script, *arguments)

    first, second = InvalidationLog(Emptied(redis), "a", 30.0), InvalidationLog(Shared(redis), "b", 30.0)
    first.start()
    second.start()
    _, confirmed = await asyncio.wait_for(first.purge(["model:x"]), 60)
    assert confirmed == 2
    await first.close()
    await second.close()


async def test_what_was_announced_before_can_be_announced_when_the_table_is_full(monkeypatch):
    first, _ = boards()
    await first.announce("models")
    monkeypatch.setattr(invalidation, "_MAX_SCOPES", 4)
    await first.purge(["key:a", "key:b"])
    with pytest.raises(ResourceExhaustedError):
        await first.purge(["key:c"])
    await first.announce("models")


async def test_a_process_whose_news_are_not_confirmed_serves_nothing_older_than_its_lease():
    first, second = boards()

    async def on_news(news):
        return False

    await second._send_heartbeat()
    second.on_news = on_news
    await first._run(_PURGE, "1", "1000", "models")
    second._contact -= 29
    await second._send_heartbeat()
    assert second.oldest_ms > 0


async def test_a_process_that_is_held_up_serves_nothing_older_than_its_lease():
    first, _ = boards()
    await first._send_heartbeat()
    assert first.oldest_ms == 0
    first._contact -= 29  # no heartbeat has ended since: one hangs, or the whole process was stopped
    before, oldest, after = time.time_ns() // 1_000_000, first.oldest_ms, time.time_ns() // 1_000_000
    assert before - 28_000 <= oldest <= after - 28_000
    await first._send_heartbeat()
    assert first.oldest_ms == 0


async def test_what_others_wrote_into_the_epochs_stops_no_heartbeat_and_no_request():
    first, second = boards()
    await first.announce("models")
    junk = {b"key:zz": b"7", b"\xff": b"7", b"model:a": b"9" * 30, b"model:b": b"many"}
    first._shared._redis.data[EPOCHS].update(junk)
    assert (await first.purge(["model:x"]))[1] >= 1
    await second._send_heartbeat()
    assert second.epochs.scopes["model:x"] == first.epochs.scopes["model:x"]
    for board in (first, second):
        assert len(board.epochs.key(b"d" * 16, "a", b"h" * 16)) == 32


async def test_a_purge_says_if_somebody_raised_the_version_beyond_all_epochs():
    first, _ = boards()
    await first.announce("models")
    first._shared._redis.data[EPOCHS][b"version"] = b"9" * 30
    with pytest.raises(UnavailableError, match="which no purge wrote"):
        await first.purge(["model:x"])
