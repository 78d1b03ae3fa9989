import time
import types

import pytest
from ringmesh.inference.v1 import inference_pb2

from router.admission.concurrency_limit import ConcurrencyLimits
from router.dispatcher import MOST_ENDED, Dispatcher
from router.retry_budget import RetryBudget
from router.ring import RANKS
from router.worker_link import WorkerLostError, WorkerUnreachableError
from services.runtime.errors import InvalidArgumentError, UnavailableError
from services.runtime.tracing import Trace
from tests.unit.fleets import MODEL, member, view

NOT_SAMPLED = Trace("a" * 32, "", sampled=False)
PLACE = b"\x12\x34" + bytes(14)


class Link:
    """The way to a worker that answers, fails, or is lost."""

    def __init__(self, address, asked, outcome):
        self._address = address
        self._asked = asked
        self._outcome = outcome

    async def execute(self, digest, work):
        self._asked.append(self._address)
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


def dispatcher(outcomes, lacking=()):
    """A dispatcher over workers by address, and the list of those it asks."""
    asked = []
    seen = view(
        [member(name, link=Link(name, asked, outcome), holds=name not in lacking) for name, outcome in outcomes.items()]
    )
    lost = []
    fleet = types.SimpleNamespace(
        view=seen, failed=lambda member, error: lost.append(member.address), answered=lambda *_: None
    )
    return (
        Dispatcher(fleet, ConcurrencyLimits(0.1, time.monotonic), RetryBudget(time.monotonic)),
        seen.ring.ranked(PLACE),
        asked,
        lost,
    )


DONE = inference_pb2.WorkResult(response=b"answer")
LOST = WorkerUnreachableError("gone")
NAMES = [f"w{index}" for index in range(20)]


async def run(made):
    return await made.run(MODEL, b"request", PLACE, NOT_SAMPLED)


async def test_the_owner_is_asked_first():
    made, ranked, asked, _ = dispatcher(dict.fromkeys(NAMES, DONE))
    result, member = await run(made)
    assert (result.response, asked, member.address) == (b"answer", [ranked[0]], ranked[0])


async def test_a_lost_worker_is_reported_and_the_next_in_rank_asked():
    _, ranked, _, _ = dispatcher(dict.fromkeys(NAMES, DONE))
    made, _, asked, lost = dispatcher({name: LOST if name == ranked[0] else DONE for name in NAMES})
    _, member = await run(made)
    assert (asked, lost, member.address) == ([*ranked[:2]], [ranked[0]], ranked[1])


async def test_a_worker_that_is_draining_is_passed_over_and_not_reported():
    drains = inference_pb2.WorkResult(failure=inference_pb2.Failure(code=14, message="draining"))
    _, ranked, _, _ = dispatcher(dict.fromkeys(NAMES, DONE))
    made, _, asked, lost = dispatcher({name: drains if name == ranked[0] else DONE for name in NAMES})
    await run(made)
    assert (asked, lost) == ([*ranked[:2]], [])


async def test_a_wrong_request_is_not_tried_elsewhere():
    wrong = inference_pb2.WorkResult(failure=inference_pb2.Failure(code=3, message="wrong", field="inputs"))
    made, _, asked, _ = dispatcher(dict.fromkeys(NAMES, wrong))
    with pytest.raises(InvalidArgumentError, match="wrong"):
        await run(made)
    assert len(asked) == 1


async def test_the_one_holder_in_a_large_fleet_is_found_beyond_the_ranks():
    _, ranked, _, _ = dispatcher(dict.fromkeys(NAMES, DONE))
    holder = next(name for name in NAMES if name not in ranked)
    made, _, asked, _ = dispatcher(dict.fromkeys(NAMES, DONE), [name for name in NAMES if name != holder])
    await run(made)
    assert asked == [holder]


async def test_a_fleet_that_is_down_is_given_up_after_as_many_attempts_as_there_are_ranks():
    made, _, asked, _ = dispatcher(dict.fromkeys(NAMES, LOST))
    with pytest.raises(UnavailableError, match="'m'"):
        await run(made)
    assert len(asked) == RANKS


async def test_a_request_that_may_be_what_ends_its_workers_does_not_go_through_the_whole_fleet():
    made, _, asked, _ = dispatcher(dict.fromkeys(NAMES, WorkerLostError("Socket closed")))
    with pytest.raises(UnavailableError, match=f"{MOST_ENDED} workers ended while they had it"):
        await run(made)
    assert len(asked) == MOST_ENDED
