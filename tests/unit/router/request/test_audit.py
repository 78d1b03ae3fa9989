import asyncio

import numpy as np
import pytest
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from router.balancing.catalog import Catalog, ModelEntry
from router.request.audit import Audit, ModelAudit
from router.request.audit_comparison import compare
from services.runtime.errors import ResourceExhaustedError
from services.runtime.oip.tensors import DATATYPES
from services.runtime.verdict import YES
from tests.unit.clock import Clock
from tests.unit.router.fleets import member
from tests.unit.turns import turns


def answer(values, datatype="FP32", name="y", shape=None):
    made = v2.ModelInferResponse(model_name="m", model_version="1")
    array = np.array(values, DATATYPES[datatype].dtype)
    made.outputs.add(name=name, datatype=datatype, shape=shape or array.shape)
    made.raw_output_contents.append(array.tobytes())
    return made.SerializeToString()


def words(*texts):
    made = v2.ModelInferResponse()
    made.outputs.add(name="y", datatype="BYTES", shape=[len(texts)])
    made.raw_output_contents.append(b"".join(len(text).to_bytes(4, "little") + text for text in texts))
    return made.SerializeToString()


@pytest.mark.parametrize(
    ("one", "other", "result", "largest"),
    [
        (answer([1, 2]), answer([1, 2]), "equal", 0),
        (answer([1, np.nan, np.inf]), answer([1, np.nan, np.inf]), "equal", 0),
        (answer([1000, 2]), answer([1000, 2.5]), "close", 0.5),
        (answer([10, 2]), answer([10, 2.5]), "different", 0.5),
        (answer([0, 0]), answer([0, 0.5]), "different", 0.5),
        (answer([10, 2], "FP16"), answer([10, 2.0625], "FP16"), "close", 0.0625),
        (answer([10, 2], "BF16"), answer([10, 2.25], "BF16"), "close", 0.25),
        (answer([1, 2]), answer([1, np.nan]), "different", np.inf),
        (answer([5], "INT64"), answer([6], "INT64"), "different", 1),
        (answer([1, 2], shape=[2, 1]), answer([1, 2], shape=[1, 2]), "different", 0),
        (answer([1], name="y"), answer([1], name="z"), "different", 0),
        (words(b"yes", b"no"), words(b"yes", b"yes"), "different", 0),
    ],
)
def test_answers_are_equal_close_or_different(one, other, result, largest):
    assert compare(one, other) == (result, pytest.approx(largest))


WORKER = member("w")


class FakeDispatcher:
    """Answers with the next of `answers`; counts what it was asked."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = 0
        self.priorities = []

    async def run(self, asked):
        self.asked += 1
        self.priorities.append(asked.caller.priority.name)
        await asyncio.sleep(0)
        told = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(told, Exception):
            raise told
        return inference_pb2.WorkResult(response=told, model_digest=asked.model.digest), WORKER


MODEL = ModelEntry("m", "1", b"digest", YES, v2.ModelMetadataResponse())
REQUEST = v2.ModelInferRequest(model_name="m").SerializeToString()
NONE = Catalog([])


def hit(audit, model, request, value):
    if audit.takes_hit():
        audit.begin(model, request, value)


async def audited(audit, clock, hits, model=MODEL, value=None, seconds=1.0):
    for _ in range(hits):
        hit(audit, model, REQUEST, value or answer([1]))
        while audit._task is not None:
            await asyncio.sleep(0)
        clock.now += seconds


def results(audit):
    return {sample.labels[2]: sample.value for sample in audit.samples() if len(sample.labels) == 3 and sample.value}


async def test_a_model_that_does_not_repeat_itself_leaves_the_cache_and_says_why():
    clock = Clock()
    audit = Audit(FakeDispatcher(answer([1]), answer([1]), answer([3.5])).run, 1, clock)
    await audited(audit, clock, 4)
    assert audit.may_cache(MODEL, NONE)
    await audited(audit, clock, 1)
    assert results(audit) == {"equal": 2, "different": 3}
    assert audit.may_cache(MODEL, NONE).reason == (
        "3 of 5 answers that were computed again for the audit came out different, by up to 2.5"
    )
    assert list(audit.distrusted) == [b"digest"]


async def test_other_last_bits_are_counted_and_forgiven():
    clock = Clock()
    audit = Audit(FakeDispatcher(answer([1.0000001])).run, 1, clock)
    await audited(audit, clock, 20)
    assert results(audit) == {"close": 20}
    assert not audit.distrusted


async def test_a_rare_difference_among_many_equal_answers_is_forgiven():
    clock = Clock()
    audit = Audit(FakeDispatcher(answer([2]), answer([2]), answer([2]), answer([1])).run, 1, clock)
    audit._audits[MODEL.digest] = ModelAudit(MODEL)
    audit._audits[MODEL.digest].results["equal"] = 500
    await audited(audit, clock, 10)
    assert results(audit)["different"] == 3
    assert not audit.distrusted


async def test_it_asks_with_the_least_priority_and_takes_no_refusal_for_a_verdict():
    clock = Clock()
    dispatcher = FakeDispatcher(ResourceExhaustedError("overloaded"))
    audit = Audit(dispatcher.run, 1, clock)
    await audited(audit, clock, 5)
    assert results(audit) == {"failed": 5}
    assert set(dispatcher.priorities) == {"SHEDDABLE"}
    assert not audit.distrusted


async def test_one_at_a_time_and_with_pauses_however_many_hits_there_are():
    clock = Clock()
    dispatcher = FakeDispatcher(answer([1]))
    audit = Audit(dispatcher.run, 1, clock)
    for _ in range(1000):
        hit(audit, MODEL, REQUEST, answer([1]))
    await turns()
    assert dispatcher.asked == 1
    await audited(audit, clock, 1000, seconds=0.001)
    assert 15 <= dispatcher.asked <= 22


@pytest.mark.parametrize(("share", "least", "most"), [(0, 0, 0), (0.1, 40, 165), (1, 1000, 1000)])
async def test_it_takes_the_share_that_it_is_told(share, least, most):
    clock = Clock()
    dispatcher = FakeDispatcher(answer([1]))
    await audited(Audit(dispatcher.run, share, clock), clock, 1000)
    assert least <= dispatcher.asked <= most


async def test_an_answer_of_files_that_are_gone_is_not_compared():
    clock = Clock()

    class Replaced(FakeDispatcher):
        async def run(self, asked):
            result, member = await super().run(asked)
            result.model_digest = b"other"
            return result, member

    audit = Audit(Replaced(answer([9])).run, 1, clock)
    await audited(audit, clock, 5)
    assert results(audit) == {}


async def test_classes_are_not_audited():
    request = v2.ModelInferRequest(model_name="m")
    request.outputs.add(name="y").parameters["classification"].int64_param = 1
    dispatcher = FakeDispatcher(answer([1]))
    audit = Audit(dispatcher.run, 1, Clock())
    hit(audit, MODEL, request.SerializeToString(), answer([1]))
    await asyncio.sleep(0)
    assert dispatcher.asked == 0
