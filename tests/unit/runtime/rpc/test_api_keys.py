"""API keys: what their file may say, who they admit, and how soon a change applies."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from ringmesh.cache.v1 import cache_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.cli.commands import keys as command
from services.cli.errors import CommandError
from services.runtime.errors import PermissionDeniedError, UnauthenticatedError
from services.runtime.oip.protocol import caller_metadata, identify
from services.runtime.rpc import api_keys
from services.runtime.rpc.access import CREDENTIAL, Access, credential_of
from services.runtime.rpc.api_keys import ApiKeys, KeyFileError
from tests.unit.runtime.rpc.test_access import codes, restricted, serve  # noqa: F401 - a fixture

SECRET = credential_of("ours")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys.jsonl"
    path.touch()
    return path


def add(file, id="key", tenant="", roles=("infer",), models=(), days=None):
    return command.create(file, id, tenant, [*roles], [*models], days)


def bearer(key):
    return (("authorization", f"Bearer {key}"),)


def caller(keys, metadata):
    """What the path of an inference learns of its caller."""
    said = caller_metadata(metadata)
    identify(said, Access("", (), SECRET, keys))
    return said


def test_the_file_has_hashes_only_and_is_for_its_user(file):
    key = add(file, "one", "acme", models=["mlp"], days=1)
    assert key.startswith("rmk_")
    assert len(key) > 40
    (line,) = file.read_text().splitlines()
    assert key not in line
    assert {"id": "one", "tenant": "acme", "roles": ["infer"], "models": ["mlp"]}.items() <= json.loads(line).items()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "line 1: the line: Invalid JSON"),
        ('{"id": "a"}', "roles: Field required"),
        ('{"id": "a", "roles": ["infer"]}', "either sha256 or certificate"),
        (
            '{"id": "a", "sha256": "%s", "certificate": "a.example.org", "roles": ["infer"]}',
            "either sha256 or certificate",
        ),
        ('{"id": "a", "certificate": "spiffe://a;DNS=b", "roles": ["infer"]}', "certificate"),
        ('{"id": "a", "sha256": "%s", "roles": []}', "roles"),
        ('{"id": "a", "sha256": "%s", "roles": ["root"]}', "'infer', 'read', 'operate' or 'admin'"),
        ('{"id": "a", "sha256": "%s", "roles": ["infer"], "expires": "2027-01-01"}', "expires"),
        ('{"id": "a", "sha256": "%s", "roles": ["infer"], "until": "2027-01-01T00:00:00Z"}', "until"),
        ('{"id": "a", "sha256": "%s", "roles": ["operate"], "tenant": "acme"}', "for no tenant"),
        ('{"id": "a", "sha256": "%s", "roles": ["infer"], "tenant": " acme"}', "tenant"),
    ],
)
def test_a_line_that_is_wrong_is_named(file, line, says):
    file.write_text(line.replace("%s", "0" * 64))
    with pytest.raises(KeyFileError, match=says):
        ApiKeys(file)


def test_a_command_that_is_wrong_is_refused(file):
    with pytest.raises(CommandError, match="infer, read, operate, admin"):
        add(file, roles=["root"])
    with pytest.raises(CommandError, match="for no tenant"):
        add(file, tenant="acme", roles=["admin"])
    assert file.read_text() == ""


def test_the_tenant_is_the_keys_and_a_caller_cannot_choose_another(file):
    key = add(file, "one", "acme")
    keys = ApiKeys(file)
    said = caller(keys, bearer(key))
    assert (said.error, said.tenant, said.identity.id) == (None, "acme", "one")
    assert caller(keys, (*bearer(key), ("ringmesh-tenant", "acme"))).error is None
    denied = caller(keys, (*bearer(key), ("ringmesh-tenant", "other"))).error
    assert isinstance(denied, PermissionDeniedError)
    assert "'acme', not 'other'" in denied.message
    fleet = add(file, "fleet")
    denied = caller(ApiKeys(file), (*bearer(fleet), ("ringmesh-tenant", "acme"))).error
    assert isinstance(denied, PermissionDeniedError)


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer "),),
        bearer("rmk_of_nobody"),
        (("authorization", "Basic eDp5"),),
        ((CREDENTIAL, "wrong"),),
        ((CREDENTIAL, ""),),
        (("ringmesh-tenant", "acme"),),
    ],
)
def test_without_a_valid_key_nothing_is_answered(file, metadata):
    add(file, "one", "acme")
    assert isinstance(caller(ApiKeys(file), metadata).error, UnauthenticatedError)


def test_two_keys_in_one_request_are_refused(file):
    key = add(file)
    assert caller(ApiKeys(file), bearer(key) * 2).error is not None


def test_a_service_of_the_fleet_may_act_for_any_tenant(file):
    said = caller(ApiKeys(file), ((CREDENTIAL, SECRET), ("ringmesh-tenant", "acme")))
    assert (said.error, said.tenant) == (None, "acme")


def test_a_key_that_expired_is_refused_though_it_was_known(file, monkeypatch):
    key = add(file, days=1)
    keys = ApiKeys(file)
    assert caller(keys, bearer(key)).error is None
    later = (datetime.now(UTC) + timedelta(days=1, seconds=1)).timestamp()
    monkeypatch.setattr(api_keys.time, "time", lambda: later)
    assert "expired" in caller(keys, bearer(key)).error.message


async def test_a_change_of_the_file_applies_and_a_broken_file_changes_nothing(file, monkeypatch):
    monkeypatch.setattr(api_keys, "_POLL_SECONDS", 0.001)
    old = add(file, "old")
    keys = ApiKeys(file)
    assert caller(keys, bearer(old)).error is None
    following = asyncio.create_task(keys.follow())

    async def until(condition):
        while not condition():
            await asyncio.sleep(0.001)

    async with asyncio.timeout(60):
        file.write_text("")
        new = add(file, "new")
        await until(lambda: caller(keys, bearer(old)).error is not None)
        assert caller(keys, bearer(new)).error is None
        seen = keys._seen
        file.write_text("broken")
        await until(lambda: keys._seen != seen)
        assert caller(keys, bearer(new)).error is None
        seen = keys._seen
        file.unlink()
        await until(lambda: keys._seen != seen)
        assert caller(keys, bearer(new)).error is None
        file.write_text("")
        await until(lambda: caller(keys, bearer(new)).error is not None)
    following.cancel()


@pytest.fixture
async def denied(serve, file):  # noqa: F811
    """denied(roles, ...): the methods that a key with these roles may not call, and the address of the server."""
    every = {}

    async def denied(*roles, **scope):
        if not every:
            every["admin"] = add(file, "admin", roles=["admin"])
        key = add(file, f"{len(every)}", roles=roles, **scope)
        every[key] = key
        keys = ApiKeys(file)
        address = await serve((), SECRET, keys)
        found = await codes(address, bearer(key))
        assert not {method for method, code in found.items() if code == "UNAUTHENTICATED"}
        return {method for method, code in found.items() if code == "PERMISSION_DENIED"}

    return denied


async def test_a_key_may_do_what_its_roles_say(denied):
    everything_else = {*restricted()}
    assert everything_else <= await denied("infer")
    assert everything_else <= await denied("read")
    operate = {method for method in await denied("operate") if method in everything_else}
    assert operate == {
        *(f"ringmesh.cache.v1.CacheService/{name}" for name in ("Fetch", "ListValuable")),
        *(f"ringmesh.inference.v1.InferenceWorkerService/{name}" for name in ("Execute", "Withdraw", "GetDecision")),
    }
    assert await denied("admin") == set()


async def test_with_keys_only_probes_are_open(serve, file):  # noqa: F811
    address = await serve((), SECRET, ApiKeys(file))
    found = await codes(address)
    # Inferences are refused where they are served; see test_identity.py.
    inferences = {f"inference.GRPCInferenceService/{name}" for name in ("ModelInfer", "ModelStreamInfer")}
    is_open = {method for method, code in found.items() if code != "UNAUTHENTICATED"} - inferences
    assert is_open == {f"inference.GRPCInferenceService/{name}" for name in ("ServerLive", "ServerReady")}
    assert "UNAUTHENTICATED" not in (await codes(address, ((CREDENTIAL, SECRET),))).values()


async def test_a_key_of_models_may_call_only_what_names_one_of_them(serve, file):  # noqa: F811
    key = add(file, roles=["infer", "read", "operate"], models=["mine"])
    address = await serve((), SECRET, ApiKeys(file))
    async with grpc.aio.insecure_channel(address) as channel:

        async def ask(method, request):
            path = f"/inference.GRPCInferenceService/{method}"
            await channel.unary_unary(path)(request.SerializeToString(), metadata=bearer(key))

        for name in ("ModelMetadata", "ModelConfig", "ModelStatistics", "ModelReady"):
            await ask(name, v2.ModelReadyRequest(name="mine"))
            for other in ("other", ""):
                with pytest.raises(grpc.aio.AioRpcError, match="is for mine"):
                    await ask(name, v2.ModelReadyRequest(name=other))
        await ask("RepositoryModelLoad", v2.RepositoryModelLoadRequest(model_name="mine"))
        for method, request in (
            ("RepositoryModelLoad", v2.RepositoryModelLoadRequest(model_name="other")),
            ("RepositoryIndex", v2.RepositoryIndexRequest()),
            ("SystemSharedMemoryRegister", v2.SystemSharedMemoryRegisterRequest(name="mine")),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="is for mine"):
                await ask(method, request)


async def test_a_key_of_a_tenant_reaches_its_own_items_of_the_cache_only(serve, file):  # noqa: F811
    key = add(file, tenant="acme", roles=["infer", "read"])
    address = await serve((), SECRET, ApiKeys(file))
    async with grpc.aio.insecure_channel(address) as channel:

        async def ask(method, request):
            path = f"/ringmesh.cache.v1.CacheService/{method}"
            await channel.unary_unary(path)(request.SerializeToString(), metadata=bearer(key))

        await ask("Get", cache_pb2.GetRequest(tenant="acme"))
        for method, request in (
            ("Get", cache_pb2.GetRequest(tenant="other")),
            ("Put", cache_pb2.PutRequest()),
            ("GetMany", cache_pb2.GetManyRequest(tenant="other")),
            ("Stats", cache_pb2.StatsRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="is for tenant 'acme'"):
                await ask(method, request)
