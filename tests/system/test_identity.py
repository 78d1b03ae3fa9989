"""API keys as callers meet them: on a router and on a worker, for hits and misses, and while keys are rewritten."""

import asyncio

import grpc
import numpy as np
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc

from services.cli.commands import keys
from tests.certificates import replace
from tests.system.test_cache import INFER
from tests.unit.runtime.rpc.test_tokens import AUDIENCE, ISSUER, bearer, jwks, token

pytestmark = pytest.mark.both_engines

OK, UNAUTHENTICATED, DENIED = "OK", "UNAUTHENTICATED", "PERMISSION_DENIED"


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "keys.jsonl"


@pytest.fixture(scope="module")
def key(key_file):
    """The keys of this module, by name."""
    made = {
        "acme": keys.create(key_file, "acme", "acme", ["infer"], [], None),
        "other": keys.create(key_file, "other", "other", ["infer"], [], None),
        "of scoped": keys.create(key_file, "of-scoped", "", ["infer", "operate"], ["scoped"], None),
        "reader": keys.create(key_file, "reader", "", ["read"], [], None),
        "operator": keys.create(key_file, "operator", "", ["operate"], [], None),
        "reading": keys.create(key_file, "reading", "", ["infer", "read"], [], None),
    }
    return {name: (("authorization", f"Bearer {value}"),) for name, value in made.items()}


@pytest.fixture
def worker(start_worker, key, key_file):
    return start_worker("worker-keys", api_keys=key_file).address


@pytest.fixture
def router(start_router, worker, key_file):
    return start_router([worker], None, api_keys=key_file).address


def request(value, model="scoped"):
    made = v2.ModelInferRequest(model_name=model)
    made.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    made.raw_input_contents.append(np.full((1, 1), value, np.float32).tobytes())
    return made


async def infer(channel, value, metadata=(), model="scoped"):
    """(status, whether a hit or a miss)"""
    call = channel.unary_unary(INFER)(request(value, model).SerializeToString(), metadata=metadata, timeout=120)
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name, ""
    return OK, dict(await call.trailing_metadata()).get("ringmesh-cache", "")


async def streamed(channel, value, metadata=()):
    """The status of the same request in a stream."""
    call = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(
        iter([request(value)]), metadata=(*metadata, ("triton_grpc_error", "true"))
    )
    try:
        async for _ in call:
            break
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return OK


async def test_inferences_need_a_key_with_the_role_and_the_model(router, worker, key):
    for address in (router, worker):
        async with grpc.aio.insecure_channel(address) as channel:
            # Twice, because the second one may be a hit.
            for _ in range(2):
                assert (await infer(channel, 1, key["of scoped"]))[0] == OK
                assert (await infer(channel, 1))[0] == UNAUTHENTICATED
                assert (await infer(channel, 1, (("authorization", "Bearer rmk_wrong"),)))[0] == UNAUTHENTICATED
                assert (await infer(channel, 1, key["reader"]))[0] == DENIED
                assert (await infer(channel, 1, key["of scoped"], "random"))[0] == DENIED
                assert (await infer(channel, 1, key["acme"], "random"))[0] == OK
            assert await streamed(channel, 1, key["of scoped"]) == OK
            assert await streamed(channel, 1) == UNAUTHENTICATED
            assert await streamed(channel, 1, key["reader"]) == DENIED


def like(name):
    """The name of no model, with a typing error in that of one."""
    return name[:-1] + "_"


async def refusal(call):
    """(status, message)"""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details()


async def test_a_key_that_may_not_read_hears_of_no_other_model(router, worker, key):
    for address in (router, worker):
        async with grpc.aio.insecure_channel(address) as channel:
            stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for call in (
                stub.ModelInfer(request(1, like("scoped")), metadata=key["acme"]),
                stub.ModelMetadata(v2.ModelMetadataRequest(name=like("scoped")), metadata=key["acme"]),
            ):
                status, message = await refusal(call)
                assert status == "NOT_FOUND"
                assert "scoped" not in message.replace(like("scoped"), "")
            index = stub.RepositoryIndex(v2.RepositoryIndexRequest(), metadata=key["acme"])
            assert (await refusal(index))[0] == DENIED
            # A key of some models is told the same of a model that there is, and of one that there is not.
            told = [
                await refusal(stub.ModelInfer(request(1, name), metadata=key["of scoped"]))
                for name in ("random", "nobody")
            ]
            assert told[0] == (DENIED, told[1][1].replace("nobody", "random"))


async def test_a_key_that_may_read_is_told_the_model_with_the_nearest_name(router, key):
    async with grpc.aio.insecure_channel(router) as channel:
        call = channel.unary_unary(INFER)(
            request(1, like("scoped")).SerializeToString(), metadata=key["reading"], timeout=120
        )
        status, message = await refusal(call)
        assert (status, "did you mean 'scoped'?" in message) == ("NOT_FOUND", True)


async def test_the_tenant_of_a_cached_answer_is_that_of_the_key(router, key):
    async with grpc.aio.insecure_channel(router) as channel:
        assert await infer(channel, 2, key["acme"]) == (OK, "miss")
        assert await infer(channel, 2, key["acme"]) == (OK, "hit-local")
        assert await infer(channel, 2, (*key["acme"], ("ringmesh-tenant", "acme"))) == (OK, "hit-local")
        assert await infer(channel, 2, key["other"]) == (OK, "miss")
        assert (await infer(channel, 2, (*key["other"], ("ringmesh-tenant", "acme"))))[0] == DENIED


async def test_operators_need_their_role_and_routers_reach_workers_by_their_credential(router, key):
    async with grpc.aio.insecure_channel(router) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        load = v2.RepositoryModelLoadRequest(model_name="scoped")
        await stub.RepositoryModelLoad(load, metadata=key["operator"])
        await stub.RepositoryModelLoad(load, metadata=key["of scoped"])
        assert (await stub.RepositoryIndex(v2.RepositoryIndexRequest(), metadata=key["reader"])).models
        other = v2.RepositoryModelLoadRequest(model_name="random")
        for code, asked, metadata in (
            (DENIED, load, key["acme"]),
            (DENIED, load, key["reader"]),
            (DENIED, other, key["of scoped"]),
            (UNAUTHENTICATED, load, ()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.RepositoryModelLoad(asked, metadata=metadata)
            assert refused.value.code().name == code
        assert (await stub.ServerLive(v2.ServerLiveRequest())).live


async def test_a_token_serves_as_a_key_does_and_its_key_is_rotated_in(start_router, worker, key, key_file, tmp_path):
    file = replace(tmp_path / "jwks.json", jwks("ec"))
    settings = {"jwt_keys": file, "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE}
    router = await asyncio.to_thread(start_router, [worker], None, api_keys=key_file, **settings)
    old, new = (bearer(token(kid, tenant="acme")) for kid in ("ec", "other"))
    async with grpc.aio.insecure_channel(router.address) as channel:
        assert await infer(channel, 4, old) == (OK, "miss")
        assert await infer(channel, 4, key["acme"]) == (OK, "hit-local")
        assert (await infer(channel, 4, (*old, ("ringmesh-tenant", "other"))))[0] == DENIED
        assert (await infer(channel, 4, bearer(token(exp=1))))[0] == UNAUTHENTICATED
        replace(file, jwks("ec", "other"))
        async with asyncio.timeout(60):
            while (await infer(channel, 4, new))[0] == UNAUTHENTICATED:
                assert await infer(channel, 4, old) == (OK, "hit-local")
        assert await infer(channel, 4, new) == (OK, "hit-local")


async def test_a_key_is_revoked_and_another_admitted_while_requests_run(start_router, worker, key, tmp_path):
    file = tmp_path / "keys.jsonl"
    old = (("authorization", f"Bearer {keys.create(file, 'old', '', ['infer'], [], None)}"),)
    router = await asyncio.to_thread(start_router, [worker], None, api_keys=file)
    async with grpc.aio.insecure_channel(router.address) as channel:
        assert (await infer(channel, 3, old))[0] == OK
        fresh = tmp_path / "fresh"
        new = (("authorization", f"Bearer {keys.create(fresh, 'new', '', ['infer'], [], None)}"),)
        assert (await infer(channel, 3, new))[0] == UNAUTHENTICATED
        fresh.replace(file)
        async with asyncio.timeout(60):
            while (await infer(channel, 3, old))[0] == OK:
                assert (await infer(channel, 3, new))[0] in (OK, UNAUTHENTICATED)
        assert await infer(channel, 3, new) == (OK, "hit-local")
        assert (await infer(channel, 3, old))[0] == UNAUTHENTICATED
