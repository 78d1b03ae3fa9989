"""What one worker says or does must not reach the others: nonsense, and an answer that never comes."""

import asyncio
import time

import pytest
from ringmesh.inference.v1 import inference_pb2

from router.balancing.member import Listing
from router.membership.fleet import Fleet
from router.transport.worker_client import EnvelopeItem, LinkClosedError
from services.runtime.errors import UnavailableError


def model(name="m", version="1", digest=b"d" * 16, **more):
    return inference_pb2.ModelVersion(name=name, version=version, digest=digest, **more)


def description(*models, **more):
    told = {"worker_id": "w", "accepting": True, "version": 1, "weight": 1.0, **more}
    return inference_pb2.DescribeResponse(models=models, **told)


def failed(name="bad", version="1", reason="it is broken"):
    return inference_pb2.FailedVersion(model=name, version=version, reason=reason)


class Workers:
    """Channels to workers by address, each of which says of itself what `says` has; `stopped` ones do not answer."""

    def __init__(self, says):
        self.says = says
        self.stopped = set()
        self.executed = []

    def channel(self, address):
        return Channel(self, address)


class Channel:
    def __init__(self, workers, address):
        self._workers = workers
        self._address = address

    def begin(self, method, request, done):
        self._workers.executed.append(self._address)
        if self._address not in self._workers.stopped:
            count = len(inference_pb2.ExecuteRequest.FromString(request).items)
            results = [inference_pb2.WorkResult(response=b"answer")] * count
            answer = inference_pb2.ExecuteResponse(results=results).SerializeToString()
            asyncio.get_running_loop().call_soon(done, answer)
        return lambda: None

    async def call(self, method, request):
        if self._address in self._workers.stopped:
            await asyncio.Event().wait()
        return self._workers.says[self._address].SerializeToString()

    async def ping(self, seconds):
        return self._address not in self._workers.stopped

    def is_local(self, port):
        return False

    def drop(self):
        pass

    async def close(self):
        pass


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
async def fleet_of():
    fleets = []

    def create(says):
        workers = Workers(says)
        fleet = Fleet(
            [Listing(address) for address in says], lambda _: None, clock=time.monotonic, open_channel=workers.channel
        )
        fleets.append(fleet)
        fleet.start()
        return fleet, workers

    yield create
    for fleet in fleets:
        fleet.close()


NAN = float("nan")


@pytest.mark.parametrize(
    ("nonsense", "reason"),
    [
        (description(model(version="abc")), "version is 'abc'"),
        (description(model(version="")), "version is ''"),
        (description(model(version="-1")), "version is '-1'"),
        (description(model(version="9" * 5000)), "version is '999"),
        (description(model(version="\u0661")), "not an integer"),
        (description(model(), model()), "listed twice"),
        (description(model(name="")), "empty or not printable"),
        (description(model(name="a\0b")), "empty or not printable"),
        (description(model(digest=b"short")), "5 bytes"),
        (description(model(digest=b"")), "0 bytes"),
        (description(model(semantic_threshold=NAN)), "semantic_threshold"),
        (description(model(ttl_ms=2**64 - 1)), "fresh for"),
        (description(model(), weight=NAN), "weight is nan"),
        (description(model(), weight=float("inf")), "weight is inf"),
        (description(model(), weight=-1.0), "weight is -1"),
        (description(model(), worker_id="a\0b"), "id is"),
        (description(model(), zone="\n"), "zone is"),
        (description(model(), envelope_socket="/a\0b"), "envelope socket is"),
        (description(model(), failed=[failed(reason="a\0b")]), "the reason is no text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_worker_that_reports_nonsense_is_unhealthy_and_the_others_are_not(fleet_of, nonsense, reason):
    fleet, workers = fleet_of({"a:1": description(model()), "b:1": nonsense, "c:1": description(model())})
    bad = fleet.view.members["b:1"]
    await until(
        lambda: fleet.view.members["a:1"].healthy and fleet.view.members["c:1"].healthy and reason in bad.reason
    )
    assert "invalid description" in bad.reason
    assert not bad.healthy
    assert fleet.view.catalog.find("m", "").version == "1"
    # Once it comes to its senses it is asked.
    workers.says["b:1"] = description(model())
    await until(lambda: bad.healthy)


async def test_what_a_worker_could_not_load_is_told_to_callers_until_one_can(fleet_of):
    fleet, workers = fleet_of({"a:1": description(model(), failed=[failed()]), "b:1": description(model(), version=1)})
    members = fleet.view.members
    await until(lambda: all(member.healthy for member in members.values()))
    with pytest.raises(UnavailableError, match="version 1 of model 'bad' failed to load: it is broken"):
        fleet.view.catalog.find("bad", "1")
    workers.says["a:1"] = description(model(), failed=[failed(reason="it is missing")], version=2)
    await fleet.describe(members["a:1"])
    with pytest.raises(UnavailableError, match="it is missing"):
        fleet.view.catalog.find("bad", "")
    workers.says["b:1"] = description(model(), model("bad"), version=2)
    await fleet.describe(members["b:1"])
    assert fleet.view.catalog.find("bad", "").name == "bad"


async def test_a_worker_that_comes_to_report_nonsense_is_passed_over(fleet_of):
    fleet, workers = fleet_of({"a:1": description(model()), "b:1": description(model())})
    members = fleet.view.members
    await until(lambda: all(member.healthy for member in members.values()))
    workers.says["b:1"] = description(model(version="abc"), version=2)
    await until(lambda: "invalid" in members["b:1"].reason)
    assert members["a:1"].healthy
    assert [*fleet.view.catalog.versions["m"]] == ["1"]


async def test_a_worker_that_owes_an_answer_and_answers_no_ping_gives_back_what_it_has(fleet_of):
    fleet, workers = fleet_of({"a:1": description(model()), "b:1": description(model())})
    members = fleet.view.members
    await until(lambda: all(member.healthy for member in members.values()))
    workers.stopped.add("a:1")
    outcomes = []
    members["a:1"].link.send(b"d" * 16, EnvelopeItem(b"request", b"", None, "", outcomes.append))
    await until(lambda: outcomes)
    assert "stopped answering" in str(outcomes[0])
    assert (members["a:1"].healthy, members["b:1"].healthy) == (False, True)
    workers.stopped.clear()
    await until(lambda: members["a:1"].healthy)
    members["a:1"].link.send(b"d" * 16, EnvelopeItem(b"request", b"", None, "", outcomes.append))
    await until(lambda: len(outcomes) == 2)
    assert outcomes[1].response == b"answer"


async def test_a_worker_that_is_lost_is_described_at_once_and_not_at_the_next_poll(fleet_of):
    fleet, _ = fleet_of({"a:1": description(model())})
    member = fleet.view.members["a:1"]
    await until(lambda: member.healthy)
    await asyncio.sleep(0)
    member.link.give_up()
    fleet.failed(member, LinkClosedError("gone"))
    for _ in range(20):
        await asyncio.sleep(0)
    assert member.healthy
