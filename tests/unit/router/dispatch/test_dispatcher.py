import asyncio
import time
import types
from dataclasses import replace

import pytest
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from router.admission.caller import ANYBODY, Caller, Priority, RefusedError
from router.admission.concurrency_limit import ConcurrencyLimits
from router.balancing.ring import RANKS
from router.dispatch.attempts import MOST_ENDED, DispatchRequest, FatalRequestError
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.retry_budget import RESERVE_PER_SECOND, SHARE, WINDOW_SECONDS, RetryBudget
from router.dispatch.tail_latency import TailLatency
from router.transport.worker_client import LinkClosedError, NotSentError, WorkerLostError, WorkerUnreachableError
from services.runtime import driver
from services.runtime.errors import InvalidArgumentError, UnavailableError
from services.runtime.telemetry.tracing import Trace
from tests.unit.router.fleets import MODEL, member, view
from tests.unit.turns import turns

NOT_SAMPLED = Trace("a" * 32, "", sampled=False)
PLACE = b"\x12\x34" + bytes(14)


class Link:
    """The way to a worker that answers, fails, or is lost."""

    def __init__(self, address, asked, outcome):
        self._address = address
        self._asked = asked
        self._outcome = outcome

    def send(self, digest, item):
        self._asked.append(self._address)
        if self._outcome is not NEVER:
            asyncio.get_running_loop().call_soon(item.done, self._outcome)

    def withdraw(self, sent):
        pass


def dispatcher(outcomes, lacking=(), link=Link):
    """A dispatcher over workers by address, and the list of those it asks."""
    asked = []
    seen = view(
        [member(name, link=link(name, asked, outcome), holds=name not in lacking) for name, outcome in outcomes.items()]
    )
    lost = []
    fleet = types.SimpleNamespace(
        view=seen, failed=lambda member, error: lost.append(member.address), answered=lambda *_: None
    )
    return (
        Dispatcher(fleet, ConcurrencyLimits(0.1, time.monotonic), RetryBudget(time.monotonic), TailLatency()),
        seen.ring.ranked(PLACE),
        asked,
        lost,
    )


NEVER = object()
DONE = inference_pb2.WorkResult(response=b"answer")
LOST = WorkerUnreachableError("gone")
NAMES = [f"w{index}" for index in range(20)]


async def run(made, model=MODEL, data=b"request", place=PLACE, **more):
    return await driver.run(made.run(DispatchRequest(model, data, place, NOT_SAMPLED, **more)))


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


HEDGED = replace(MODEL, hedged=True)


async def hedged(outcome_of_owner, outcome=DONE, *, seen=64, **request):
    """Who answered, who was asked, the owner, and who was lost, after so many answers of a model that is hedged.

    They took no time, so the hedge is due in the next turn of the loop.
    """
    _, ranked, _, _ = dispatcher(dict.fromkeys(NAMES, DONE))
    made, _, asked, lost = dispatcher({name: outcome_of_owner if name == ranked[0] else outcome for name in NAMES})
    for _ in range(seen):
        made._parts.tails.observe(HEDGED.digest, 0.0)
    result = asyncio.create_task(run(made, HEDGED, **{"request_hash": PLACE} | request))
    await turns()
    member = (await result)[1].address if result.done() else None
    result.cancel()
    return member, asked, ranked, lost


async def test_a_slow_attempt_of_a_hedged_model_is_made_elsewhere_too():
    member, asked, ranked, _ = await hedged(NEVER)
    assert (member, asked) == (ranked[1], [*ranked[:2]])


async def test_a_request_with_outputs_in_shared_memory_is_not_hedged_since_the_slower_worker_would_write_them_later():
    region = v2.ModelInferRequest()
    region.outputs.add(name="y").parameters["shared_memory_region"].string_param = "mine"
    request = {"request_hash": b"", "place": b""}
    for data, attempts in ((b"request", 2), (region.SerializeToString(), 1)):
        _, asked, _, _ = await hedged(NEVER, NEVER, data=data, **request)
        assert len(asked) == attempts


async def test_a_fast_answer_is_not_hedged():
    member, asked, ranked, _ = await hedged(DONE)
    assert (member, asked) == (ranked[0], [ranked[0]])


async def test_nothing_is_hedged_before_it_is_known_what_is_slow():
    member, asked, ranked, _ = await hedged(NEVER, seen=63)
    assert (member, asked) == (None, [ranked[0]])


async def test_a_hedge_that_is_lost_leaves_the_first_attempt_alone():
    member, asked, ranked, lost = await hedged(NEVER, LOST)
    assert (member, asked, lost) == (None, [*ranked[:2]], [ranked[1]])


class Waits:
    """The way to a worker whose requests wait until the test says what becomes of them."""

    def __init__(self, address, asked, _):
        self._address = address
        self._asked = asked

    def send(self, digest, item):
        self._asked.append((self._address, item))

    def withdraw(self, sent):
        sent.done = None


async def test_a_request_that_ends_its_workers_ends_no_more_of_them_where_it_is_hedged():
    made, _, asked, _ = dispatcher(dict.fromkeys(NAMES, NEVER), link=Waits)
    for _ in range(64):
        made._parts.tails.observe(HEDGED.digest, 0.001)
    result = asyncio.create_task(run(made, HEDGED, request_hash=PLACE))
    # Whoever has it ends, one a turn, but not before the hedge of the first attempt is under way.
    async with asyncio.timeout(60):
        while not result.done():
            await asyncio.sleep(0.002)
            if len(asked) > 1:
                for _, sent in asked:
                    if sent.done is not None:
                        sent.done, done = None, sent.done
                        done(WorkerLostError("Socket closed"))
                        break
    with pytest.raises(FatalRequestError, match=f"{MOST_ENDED} workers ended while they had it"):
        await result
    assert len(asked) == MOST_ENDED
    assert all(made._parts.limits.of(name, HEDGED.digest).in_flight == 0 for name in NAMES)


async def test_the_other_attempt_of_a_hedged_request_is_left_when_as_many_workers_have_ended_as_may():
    made, _, asked, _ = dispatcher(dict.fromkeys(NAMES, NEVER), link=Waits)
    for _ in range(64):
        made._parts.tails.observe(HEDGED.digest, 0.001)
    result = asyncio.create_task(run(made, HEDGED, request_hash=PLACE))
    async with asyncio.timeout(60):
        while len(asked) < 2:
            await asyncio.sleep(0.002)
    asked[0][1].done(WorkerLostError("Socket closed"))
    await turns()
    assert (len(asked), result.done()) == (2, False)
    asked[1][1].done(DONE)
    assert (await result)[0] is DONE


async def test_a_request_that_never_left_is_moved_without_a_retry_as_far_as_there_are_workers():
    made, _, asked, _ = dispatcher(dict.fromkeys(NAMES, NotSentError("closed")))
    made._parts.retries._balance = [-1000.0] * WINDOW_SECONDS
    with pytest.raises(UnavailableError) as caught:
        await run(made)
    assert (len(asked), caught.value.kind, made._parts.retries.denied) == (len(NAMES), "no_worker", 0)


async def test_what_a_closed_link_gives_back_is_sent_elsewhere_however_many_retries_there_were():
    _, ranked, _, _ = dispatcher(dict.fromkeys(NAMES, DONE))
    made, _, asked, _ = dispatcher({name: LinkClosedError("gone") if name == ranked[0] else DONE for name in NAMES})
    made._parts.retries._balance = [-1000.0] * WINDOW_SECONDS
    _, member = await run(made)
    assert (asked, member.address) == ([*ranked[:2]], ranked[1])


async def test_a_hedged_model_is_retried_as_others_are():
    member, asked, ranked, lost = await hedged(LOST)
    assert (member, asked, lost) == (ranked[1], [*ranked[:2]], [ranked[0]])


async def test_a_fleet_that_fails_is_not_asked_for_more_than_the_retry_budget():
    drains = inference_pb2.WorkResult(failure=inference_pb2.Failure(code=14, message="draining"))
    made, _, asked, _ = dispatcher(dict.fromkeys(NAMES, drains))
    for _ in range(1000):
        with pytest.raises(UnavailableError):
            await run(made)
    assert len(asked) == 1000 + SHARE * 1000 + RESERVE_PER_SECOND * WINDOW_SECONDS


async def test_where_all_have_enough_to_do_a_request_is_refused_at_once_and_told_when_to_retry():
    made, ranked, asked, _ = dispatcher(dict.fromkeys(NAMES[:2], DONE))
    for name in ranked:
        limit = made._parts.limits.of(name, MODEL.digest)
        limit.limit = 1
        limit.begin()
    with pytest.raises(RefusedError, match="overloaded") as refused:
        await run(made, request_hash=PLACE)
    assert (asked, refused.value.retry_after > 0) == ([], True)


async def test_what_would_be_refused_is_known_beforehand():
    made, ranked, _, _ = dispatcher(dict.fromkeys(NAMES[:2], DONE))
    for name in ranked:
        assert made.refusal(MODEL, ANYBODY) is None
        limit = made._parts.limits.of(name, MODEL.digest)
        limit.limit = 2
        limit.begin()
        limit.begin()
    refused = made.refusal(MODEL, ANYBODY)
    assert "overloaded" in refused.message
    assert all(f"{name}: has 2 requests under way" in refused.message for name in ranked)
    assert refused.retry_after > 0
    assert made.refusal(MODEL, Caller("", Priority.CRITICAL)) is None


async def test_where_nobody_holds_the_model_it_is_not_said_beforehand_that_there_is_no_room():
    made, *_ = dispatcher(dict.fromkeys(NAMES[:2], DONE), lacking=NAMES[:2])
    assert made.refusal(MODEL, ANYBODY) is None


async def test_a_worker_that_has_enough_to_do_is_passed_over():
    made, ranked, asked, _ = dispatcher(dict.fromkeys(NAMES[:2], DONE))
    limit = made._parts.limits.of(ranked[0], MODEL.digest)
    limit.limit = 1
    limit.begin()
    await run(made, request_hash=PLACE)
    assert asked == [ranked[1]]


async def test_a_request_that_was_admitted_and_lost_is_sent_to_a_worker_that_had_no_room_before():
    _, ranked, _, _ = dispatcher(dict.fromkeys(NAMES[:2], DONE))
    made, _, asked, _ = dispatcher({ranked[0]: DONE, ranked[1]: LinkClosedError("it stopped answering")})
    limit = made._parts.limits.of(ranked[0], MODEL.digest)
    limit.limit = 1
    limit.begin()
    _, member = await run(made, request_hash=PLACE)
    assert (asked, member.address) == ([ranked[1], ranked[0]], ranked[0])
