"""What a router's log says of a request that failed."""

import json

import grpc
import pytest

from tests.system.conftest import eventually
from tests.system.test_cache import fresh
from tests.system.test_tracing import traced


async def test_a_failed_request_is_one_line_with_its_trace_and_none_of_its_tensors(start_router, start_worker, capfd):
    worker = start_worker("worker-logs")
    router = start_router([worker.address], None, log_format="json")
    request = fresh()
    request.inputs[0].name = "z\nWARNING all is lost"
    request.raw_input_contents[0] = b"secret".ljust(256, b"-")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await traced(router.address, request)
    trace_id = dict(caught.value.trailing_metadata())["ringmesh-trace-id"]
    text = ""

    def is_told():
        nonlocal text
        text += capfd.readouterr().err
        return trace_id in text and text.endswith("\n")

    eventually(is_told)
    (line,) = [line for line in text.splitlines() if trace_id in line]
    told = json.loads(line)
    assert (told["message"], told["code"], told["model"]) == (
        "a request failed",
        "INVALID_ARGUMENT",
        request.model_name,
    )
    assert told["duration_ms"] > 0
    assert "secret" not in text
