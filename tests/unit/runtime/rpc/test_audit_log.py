"""The audit log: who did what, when, from where, and how it ended."""

import json
from datetime import UTC, datetime

import grpc
import pytest
from ringmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from ringmesh.cache.v1 import cache_pb2
from ringmesh.ledger.v1 import ledger_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.router.v1 import router_pb2

from services.runtime.rpc import audit_log
from services.runtime.rpc.access import CREDENTIAL, LOOPBACK, credential_of
from services.runtime.rpc.api_keys import ApiKeys
from services.runtime.rpc.audit_log import AuditLog, summary
from tests.unit.runtime.rpc.test_access import serve  # noqa: F401 - a fixture
from tests.unit.runtime.rpc.test_api_keys import add, bearer, file  # noqa: F401 - a fixture

V2, CACHE = "inference.GRPCInferenceService", "ringmesh.cache.v1.CacheService"
SECRET = credential_of("ours")


@pytest.fixture
def audit(tmp_path):
    return AuditLog("router", tmp_path / "audit.jsonl")


@pytest.fixture
def lines(tmp_path):
    """What was written since the last call."""
    seen = 0

    def lines():
        nonlocal seen
        path = tmp_path / "audit.jsonl"
        every = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        new, seen = every[seen:], len(every)
        return new

    return lines


@pytest.fixture
def ask(serve, audit):  # noqa: F811
    """ask(method, request, metadata, keys): the code of a call to a server with this audit log."""

    async def ask(method, request=b"", metadata=(), *, keys=None, networks=LOOPBACK):
        address = await serve(networks, SECRET, keys, audit)
        async with grpc.aio.insecure_channel(address) as channel:
            try:
                await channel.unary_unary(f"/{method}")(request, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

    return ask


async def test_what_an_operator_does_is_recorded_with_who_when_and_from_where(ask, lines, file):  # noqa: F811
    ops = add(file, "ops-1", roles=["operate"])
    request = v2.RepositoryModelLoadRequest(model_name="mlp")
    request.parameters["file:1/model.onnx"].bytes_param = bytes(100_000)
    request.parameters["config"].string_param = "{}"
    before = datetime.now(UTC)
    keys = ApiKeys(file)
    assert await ask(f"{V2}/RepositoryModelLoad", request.SerializeToString(), bearer(ops), keys=keys) == "OK"
    (line,) = lines()
    assert before.timestamp() - 1 < datetime.fromisoformat(line.pop("time")).timestamp() < before.timestamp() + 60
    assert line.pop("peer").startswith("ipv4:127.0.0.1:")
    loaded = {"config": 'string_param: "{}"', "file:1/model.onnx": "100004 bytes"}
    assert line == {
        "process": "router",
        "who": "key ops-1",
        "method": f"{V2}/RepositoryModelLoad",
        "request": {"model_name": "mlp", "parameters": loaded},
        "result": "OK",
    }
    assert ops not in json.dumps(line)


async def test_callers_without_keys_are_told_apart_by_network_and_credential(ask, lines):
    purge = cache_pb2.PurgeRequest(tenant="acme").SerializeToString()
    assert await ask(f"{CACHE}/Purge", purge) == "OK"
    assert await ask(f"{CACHE}/Purge", purge, ((CREDENTIAL, SECRET),), networks=()) == "OK"
    found = lines()
    assert [line["who"] for line in found] == ["local", "service"]
    assert [line["request"] for line in found] == [{"tenant": "acme"}] * 2


async def test_a_refused_call_is_recorded_with_its_caller_and_reason_and_without_the_key(ask, lines, file):  # noqa: F811
    reader = add(file, "reader", roles=["read"])
    keys = ApiKeys(file)
    for metadata, result, who in (
        (bearer(reader), "PERMISSION_DENIED", "key reader"),
        (bearer("rmk_wrong"), "UNAUTHENTICATED", "unknown"),
        ((), "UNAUTHENTICATED", "unknown"),
    ):
        for method in (f"{V2}/LogSettings", "ringmesh.inference.v1.InferenceWorkerService/Execute"):
            assert await ask(method, b"", metadata, keys=keys) == result
            (line,) = lines()
            assert (line["who"], line["method"], line["result"]) == (who, method, result)
            assert line["error"]
            assert "rmk_" not in json.dumps(line)


async def test_inferences_and_the_calls_of_services_are_not_recorded(ask, lines):
    for method in (f"{V2}/ModelInfer", f"{V2}/RepositoryIndex", "ringmesh.inference.v1.InferenceWorkerService/Execute"):
        assert await ask(method, metadata=((CREDENTIAL, SECRET),)) == "OK"
    assert lines() == []


def test_a_flood_of_refusals_is_counted_and_not_written(audit, lines, monkeypatch):
    now = 100.0
    monkeypatch.setattr(audit_log.time, "monotonic", lambda: now)
    for _ in range(1000):
        audit.refused("m", "p", "PERMISSION_DENIED", "no")
    assert len(lines()) == 10
    now += 1
    audit.refused("m", "p", "PERMISSION_DENIED", "no")
    (line,) = lines()
    assert line["suppressed"] == 990


def test_the_file_may_be_moved_away_and_may_be_missing(tmp_path, audit, lines, caplog):
    audit.write("local", "m", "p", "OK")
    (tmp_path / "audit.jsonl").rename(tmp_path / "audit.1")
    audit.write("local", "m", "p", "OK")
    assert len(lines()) == 1
    AuditLog("router", tmp_path / "nowhere" / "audit.jsonl").write("local", "m", "p", "OK")
    assert "cannot write the audit log" in caplog.text


def test_a_summary_fits_in_a_line(tmp_path):
    settings = v2.LogSettingsRequest()
    settings.settings["log_info"].bool_param = False
    assert summary(settings) == {"settings": {"log_info": "bool_param: false"}}
    budget = ledger_pb2.Budget(tenant="acme", period=ledger_pb2.PERIOD_DAY)
    assert summary(ledger_pb2.SetBudgetRequest(budget=budget)) == {"budget": 'tenant: "acme" period: PERIOD_DAY'}
    assert summary(cache_pb2.PurgeRequest(key=b"\x01\xff")) == {"key": "01ff"}
    assert summary(cache_pb2.WarmRequest(keys=[b"a"] * 1000)) == {"keys": "1000 items"}
    assert summary(v2.RepositoryModelLoadRequest(model_name="x" * 10_000)) == {"model_name": "x" * 200}


def test_a_summary_of_a_request_to_explain_has_no_tensors():
    request = v2.ModelInferRequest(model_name="mlp", raw_input_contents=[b"secret"])
    assert summary(router_pb2.ExplainRequest(request=request)) == {"request": {"model_name": "mlp", "bytes": 13}}


LIST = "ringmesh.audit.v1.AuditService/List"


async def listed(address, metadata=(), **request):
    """The entries that a server returns, in one list."""
    asked = audit_pb2.ListRequest(**request)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = audit_pb2_grpc.AuditServiceStub(channel)
        return [entry async for page in stub.List(asked, metadata=metadata) for entry in page.entries]


@pytest.mark.parametrize("has_file", [True, False])
async def test_the_log_is_read_newest_first_and_by_time_actor_and_method(serve, tmp_path, has_file, monkeypatch):  # noqa: F811
    audit = AuditLog("router", tmp_path / "audit.jsonl" if has_file else None)
    address = await serve(LOOPBACK, SECRET, None, audit)
    assert await listed(address) == []
    now = 1_800_000_000_000
    monkeypatch.setattr(audit_log.time, "time_ns", lambda: now * 1_000_000)
    for number in range(500):
        now += 1000
        who = f"key ops-{number % 2}"
        audit.write(who, "s/Load" if number % 5 else "s/Purge", "ipv4:10.0.0.7:1", "OK", request={"number": number})
    audit.refused("s/Purge", "ipv4:10.0.0.8:1", "PERMISSION_DENIED", "not you")
    entries = await listed(address)
    assert [json.loads(entry.request)["number"] for entry in entries[1:]] == [*reversed(range(500))]
    refused, last = entries[:2]
    assert (refused.who, refused.error, refused.result) == ("unknown", "not you", "PERMISSION_DENIED")
    assert (last.at_ms, last.process, last.who, last.peer) == (now, "router", "key ops-1", "ipv4:10.0.0.7:1")
    assert (last.method, last.result) == ("s/Load", "OK")
    assert await listed(address, limit=7) == entries[:7]
    ten = await listed(address, from_ms=now - 9_000)
    assert ten == entries[:11]
    assert await listed(address, from_ms=now - 9_000, until_ms=now) == entries[2:11]
    assert {entry.who for entry in await listed(address, who="ops-0")} == {"key ops-0"}
    purges = await listed(address, method="Purge", who="ops", limit=3)
    assert [json.loads(entry.request)["number"] for entry in purges] == [495, 490, 485]
    with pytest.raises(grpc.aio.AioRpcError, match="which is no time"):
        await listed(address, from_ms=-1)


async def test_reading_the_log_needs_the_role_admin_and_is_recorded(serve, audit, lines, file):  # noqa: F811
    admin, ops = add(file, "admin-1", roles=["admin"]), add(file, "ops-1", roles=["operate", "read"])
    address = await serve(LOOPBACK, SECRET, ApiKeys(file), audit)
    for metadata in ((), bearer(ops)):
        with pytest.raises(grpc.aio.AioRpcError, match="this needs"):
            await listed(address, metadata)
    assert len(await listed(address, bearer(admin))) == 2
    assert [(line["who"], line["result"]) for line in lines() if line["method"] == LIST][2:] == [("key admin-1", "OK")]
    assert (await listed(address, ((CREDENTIAL, SECRET),)))[0].who == "key admin-1"


async def test_lines_that_are_not_entries_and_a_line_that_is_being_written_are_left_out(serve, audit, tmp_path):  # noqa: F811
    address = await serve(LOOPBACK, SECRET, None, audit)
    audit.write("local", "m", "p", "OK")
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b'\xff{\n[]\n{"time": 1}\n' + b"x" * 200_000 + b"\n" + path.read_bytes() + b'{"time": "2026')
    (entry,) = await listed(address)
    assert entry.who == "local"
