"""The contract of a prediction cache, case by case.

Right: an answer is that of the request. Shared: the same question is computed once, whoever asks it and however.

That an answer came from the cache shows in its nonce, a number that no run repeats.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import numpy as np
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from tests.system.cache_contract.servers import NotOfferedError, Server, question, values

CASES: list["Case"] = []


@dataclass(frozen=True)
class Case:
    """`check` raises AssertionError where the server breaks the contract, NotOfferedError where it cannot."""

    promise: str
    statement: str
    check: Callable[[Server], None]


def case(promise, statement):
    def add(check):
        CASES.append(Case(promise, statement, check))
        return check

    return add


def right(statement):
    return case("right", statement)


def shared(statement):
    return case("shared", statement)


def expected(a, b, constant=0):
    return [float(np.float32(sum(a) - 2 * sum(b) + constant))]


def same(server, first, second, **metadata):
    """Both are answered by one run."""
    one, other = server.infer(first), server.infer(second, **metadata)
    assert one.nonce == other.nonce, "it was computed again"


@shared("the same request again")
def again(server):
    a, b = values(16), values(16)
    same(server, question(a, b), question(a, b))


@right("the same bytes in another shape")
def shape(server):
    a, b = values(16), values(16)
    server.infer(question(a, b, shape=(2, 8)))
    got = server.infer(question(a, b, shape=(4, 4))).outputs["shape"]
    assert got == [4, 4], f"asked for [4, 4], got the answer of {got}"


@right("the same bytes as another datatype")
def datatype(server):
    a, b = values(16), values(16)
    first = server.infer(question(a, b))
    request = question(a, b)
    request.inputs[0].datatype = "INT32"
    try:
        second = server.infer(request)
    except grpc.RpcError:  # the model takes one of them only
        return
    assert first.nonce != second.nonce, "got the answer of the other"


@right("the same bytes as the other input")
def swapped(server):
    a, b = values(16), values(16)
    server.infer(question(a, b))
    got = server.infer(question(b, a)).outputs["sum"]
    assert got == expected(b, a), f"got {got} for {expected(b, a)}"


@right("one output, then all of them")
def more_outputs(server):
    a, b = values(16), values(16)
    output = v2.ModelInferRequest.InferRequestedOutputTensor
    server.infer(question(a, b, outputs=[output(name="sum")]))
    got = sorted(server.infer(question(a, b)).outputs)
    assert got == ["nonce", "shape", "sum"], f"got {', '.join(got)}"


@right("all outputs, then one of them")
def fewer_outputs(server):
    a, b = values(16), values(16)
    output = v2.ModelInferRequest.InferRequestedOutputTensor
    server.infer(question(a, b))
    got = sorted(server.infer(question(a, b, outputs=[output(name="sum")])).outputs)
    assert got == ["sum"], f"got {', '.join(got)}"


@right("an output as classes, then as numbers")
def classification(server):
    a, b = values(16), values(16)
    classes = v2.ModelInferRequest.InferRequestedOutputTensor(name="sum")
    classes.parameters["classification"].int64_param = 1
    first = server.infer(question(a, b, outputs=[classes]))
    if first.datatypes["sum"] != "BYTES":
        raise NotOfferedError("no classification")
    plain = v2.ModelInferRequest.InferRequestedOutputTensor(name="sum")
    got = server.infer(question(a, b, outputs=[plain])).outputs["sum"]
    assert got == expected(a, b), f"got {got}"


@right("another parameter of the request")
def parameter(server):
    a, b = values(16), values(16)
    nonces = []
    for value in (1, 2):
        request = question(a, b)
        request.parameters["temperature"].int64_param = value
        nonces.append(server.infer(request).nonce)
    assert nonces[0] != nonces[1], "got the answer of the other"


@right("the same inputs to another model")
def other_model(server):
    a, b = values(16), values(16)
    server.infer(question(a, b))
    got = server.infer(question(a, b, model="contract_other")).outputs["sum"]
    assert got == expected(a, b, 1000), f"got {got} for {expected(a, b, 1000)}"


@right("the same inputs to another version")
def other_version(server):
    a, b = values(16), values(16)
    server.infer(question(a, b))
    request = question(a, b)
    request.model_version = "2"
    got = server.infer(request).outputs["sum"]
    assert got == expected(a, b, 2000), f"got {got} for {expected(a, b, 2000)}"


@right("the same request with other files under the version")
def replaced(server):
    a, b = values(16), values(16)
    request = question(a, b, model="contract_replaced")
    constant = int(server.infer(request).outputs["sum"][0] - expected(a, b)[0]) + 1
    server.replace("contract_replaced", constant)
    fresh_a = values(16)
    fresh = server.infer(question(fresh_a, b, model="contract_replaced")).outputs["sum"]
    assert fresh == expected(fresh_a, b, constant), "the new files are not served"
    got = server.infer(request).outputs["sum"]
    assert got == expected(a, b, constant), "got the answer of the old files"


@right("each answer carries the id of its own request")
def own_id(server):
    a, b = values(16), values(16)
    ids = [server.infer(question(a, b, id=name)).id for name in ("first", "second")]
    assert ids == ["first", "second"], f"got {ids}"


@shared("another id")
def other_id(server):
    a, b = values(16), values(16)
    same(server, question(a, b, id="first"), question(a, b, id="second"))


@shared("another trace context")
def other_trace(server):
    a, b = values(16), values(16)
    one, other = (
        server.infer(question(a, b), traceparent=f"00-{random.getrandbits(128) | 1:032x}-00f067aa0ba902b7-01")
        for _ in range(2)
    )
    assert one.nonce == other.nonce, "it was computed again"


@shared("the parameters that every C++ client adds, and a timeout")
def reserved(server):
    a, b = values(16), values(16)
    request = question(a, b)
    request.parameters["triton_enable_empty_final_response"].bool_param = False
    request.parameters["timeout"].int64_param = 5_000_000
    same(server, question(a, b), request)


@shared("typed and raw contents")
def typed(server):
    a, b = values(16), values(16)
    same(server, question(a, b), question(a, b, typed=True))


@shared("inputs in another order")
def order(server):
    a, b = values(16), values(16)
    same(server, question(a, b), question(a, b, swapped=True))


@shared("all outputs named, or none")
def all_outputs(server):
    a, b = values(16), values(16)
    output = v2.ModelInferRequest.InferRequestedOutputTensor
    named = [output(name=name) for name in ("nonce", "sum", "shape")]
    same(server, question(a, b), question(a, b, outputs=named))


@shared("fields in another order on the wire, and an unknown field")
def wire(server):
    a, b = values(16), values(16)
    request = question(a, b)
    name, rest = v2.ModelInferRequest(model_name=request.model_name), v2.ModelInferRequest()
    rest.CopyFrom(request)
    rest.ClearField("model_name")
    body = rest.SerializeToString() + b"\xa2\x06\x03abc" + name.SerializeToString()
    same(server, request, body)


@shared("ten concurrent callers")
def joined(server):
    request = question(values(16), values(16), model="contract_slow")
    calls = [server.start(request) for _ in range(10)]
    raws = {call.result().SerializeToString() for call in calls}
    assert len(raws) == 1, f"it was computed {len(raws)} times"
