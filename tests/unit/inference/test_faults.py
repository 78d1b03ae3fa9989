"""Exceptions that nobody foresaw, in calls: the caller hears INTERNAL each time, the log tells of it once."""

import grpc
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.work_results import failed
from services.runtime.rpc.rpc import unary


class AbortedError(Exception):
    pass


class Context:
    """Of one call."""

    async def abort(self, code, message, trailing):
        raise AbortedError(code, message)


async def test_a_fault_of_every_call_is_logged_once(caplog):
    async def broken(request, context):
        raise LookupError("nobody foresaw this")

    handler = unary(v2.ServerLiveRequest, broken)
    for _ in range(3):
        with pytest.raises(AbortedError) as ended:
            await handler.unary_unary(b"", Context())
        code, message = ended.value.args
        assert code is grpc.StatusCode.INTERNAL
        assert "LookupError" in message
        assert "nobody foresaw" not in message
    (record,) = caplog.records
    assert isinstance(record.exc_info[1], LookupError)


def test_a_fault_of_every_request_of_a_worker_is_logged_once(caplog):
    results = [failed(LookupError("nobody foresaw this"), 0) for _ in range(3)]
    assert {result.failure.code for result in results} == {grpc.StatusCode.INTERNAL.value[0]}
    assert len(caplog.records) == 1
