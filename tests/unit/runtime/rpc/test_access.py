"""Who may call what, on both engines and over real connections."""

import asyncio
import itertools

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2
from grpc_reflection.v1alpha import reflection_pb2
from ringmesh.cache.v1 import cache_pb2
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.router.v1 import router_pb2

from router.transport.grpc_channel import CallError, GrpcChannel
from services.runtime.oip.protocol import fast_path_handler
from services.runtime.rpc.access import CREDENTIAL, LOOPBACK, Access, credential_of, warning
from services.runtime.rpc.roles import Role, role_of
from services.runtime.rpc.rpc import Answer, Service
from services.runtime.rpc.server import Engine, Server
from tests.system.processes import free_address

FILES = (v2, cache_pb2, router_pb2, inference_pb2)
DESCRIPTORS = [service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()]
METHODS = [(service, method) for service in DESCRIPTORS for method in service.methods]
RESTRICTED = """
    inference.GRPCInferenceService: RepositoryModelLoad RepositoryModelUnload TraceSetting LogSettings
    SystemSharedMemoryRegister SystemSharedMemoryUnregister CudaSharedMemoryRegister CudaSharedMemoryUnregister
    ringmesh.cache.v1.CacheService: Purge Warm Fetch ListValuable
    ringmesh.router.v1.RouterService: Explain
    ringmesh.inference.v1.InferenceWorkerService: Execute Withdraw GetDecision
"""


def restricted():
    service = ""
    for word in RESTRICTED.split():
        if word.endswith(":"):
            service = word[:-1]
        else:
            yield f"{service}/{word}"


async def _one(data, _):
    return b""


async def _many(data, _):
    yield b""


async def _fast(data, metadata, deadline):
    return Answer(b"", ())


def services():
    """All services of Ringmesh, with handlers that answer with nothing."""
    for service in DESCRIPTORS:
        handlers = {}
        for method in service.methods:
            if method.client_streaming:
                handlers[method.name] = grpc.stream_stream_rpc_method_handler(_many)
            elif method.server_streaming:
                handlers[method.name] = grpc.unary_stream_rpc_method_handler(_many)
            else:
                handlers[method.name] = grpc.unary_unary_rpc_method_handler(_one)
        fast = {name: _fast for name in ("ModelInfer", "Execute") if name in handlers}
        yield Service(service, {**handlers, **{name: fast_path_handler(_fast) for name in fast}}, fast)


async def start(engine, access, address):
    server = Server(engine, address, list(services()), max_message_bytes=1 << 20, max_connection_age=300, access=access)
    await server.start()
    return server


@pytest.fixture(params=[Engine.NATIVE, Engine.GRPCIO])
async def serve(request):
    """Starts a server for callers in these networks, and returns its address. All callers of tests are on this host."""
    started = []

    async def serve(networks, credential="", keys=None, audit=None):
        address = free_address()
        # An address that other hosts could reach, so that nobody is local by the address of the server alone.
        access = Access("0.0.0.0:1", networks, credential, keys, audit)
        started.append(await start(request.param, access, address))
        return address

    yield serve
    for server in started:
        await server.stop(0)


def _code(channel, method, *, stream_in=False, stream_out=False, metadata=(), request=b""):
    path = f"/{method}"
    try:
        if stream_in:
            call = channel.stream_stream(path)(iter([request]), metadata=metadata)
        elif stream_out:
            call = channel.unary_stream(path)(request, metadata=metadata)
        else:
            channel.unary_unary(path)(request, metadata=metadata)
            return "OK"
        for _ in call:
            break
        call.cancel()
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def _codes(address, metadata):
    with grpc.insecure_channel(address) as channel:
        found = {
            f"{service.full_name}/{method.name}": _code(
                channel,
                f"{service.full_name}/{method.name}",
                stream_in=method.client_streaming,
                stream_out=method.server_streaming,
                metadata=metadata,
            )
            for service, method in METHODS
        }
        for version in ("v1", "v1alpha"):
            name = f"grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
            request = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
            found[name] = _code(channel, name, stream_in=True, metadata=metadata, request=request)
        for method in channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].methods:
            name = f"grpc.channelz.v1.Channelz/{method.name}"
            found[name] = _code(channel, name, metadata=metadata)
        return found


async def codes(address, metadata=()):
    """Calls every method; returns the code of each.

    By a thread: grpc.aio answers INTERNAL now and then if a call ends while its first message is written.
    """
    return await asyncio.to_thread(_codes, address, metadata)


async def test_from_other_hosts_all_that_changes_or_shows_the_inside_is_refused_and_the_rest_is_not(serve):
    found = await codes(await serve(()))
    denied = {method for method, code in found.items() if code == "PERMISSION_DENIED"}
    assert {method for method in denied if not method.startswith("grpc.")} == set(restricted())
    assert {method for method in found if method.startswith("grpc.")} <= denied


async def test_callers_of_an_admin_network_may_do_everything(serve):
    found = await codes(await serve(LOOPBACK))
    assert "PERMISSION_DENIED" not in found.values()


@pytest.mark.parametrize("name", ["x-forwarded-for", "x-forwarded-proto", "forwarded", "x-real-ip", "via"])
async def test_a_call_that_a_proxy_of_this_host_forwards_is_not_of_this_host(serve, name):
    found = await codes(await serve(LOOPBACK), ((name, "127.0.0.1"),))
    assert set(restricted()) <= {method for method, code in found.items() if code == "PERMISSION_DENIED"}


async def test_a_server_for_this_host_alone_shows_its_services_to_everyone_who_reaches_it():
    for engine in Engine:
        address = free_address()
        server = await start(engine, None, address)
        assert "PERMISSION_DENIED" not in (await codes(address)).values()
        await server.stop(0)


async def test_services_with_the_same_secret_may_call_each_other_from_anywhere(serve):
    address = await serve((), credential_of("ours"))
    ours = await codes(address, ((CREDENTIAL, credential_of("ours")),))
    assert "PERMISSION_DENIED" not in ours.values()
    for wrong in (credential_of("theirs"), "", "ours"):
        theirs = await codes(address, ((CREDENTIAL, wrong),))
        assert set(restricted()) <= {method for method, code in theirs.items() if code == "PERMISSION_DENIED"}


async def test_without_a_secret_no_credential_is_right(serve):
    found = await codes(await serve(()), ((CREDENTIAL, ""),))
    assert set(restricted()) <= {method for method, code in found.items() if code == "PERMISSION_DENIED"}


async def test_the_routers_channel_shows_its_credential_and_a_refusal_says_what_to_do(serve):
    address = await serve((), credential_of("ours"))
    method = "/ringmesh.inference.v1.InferenceWorkerService/Execute"
    channel = GrpcChannel(address, credential=credential_of("ours"))
    assert await channel.call(method, b"") == b""
    channel.drop()
    for credential in ("", credential_of("theirs")):
        channel = GrpcChannel(address, credential=credential)
        with pytest.raises(CallError, match=r"RINGMESH_ADMIN_NETWORKS.*RINGMESH_KEY_SECRET") as refused:
            await channel.call(method, b"")
        assert refused.value.code is grpc.StatusCode.PERMISSION_DENIED
        channel.drop()


@pytest.mark.parametrize(
    ("peer", "near"),
    [
        *itertools.product(["ipv4:127.0.0.1:1", "ipv4:127.9.9.9:1", "ipv6:[::1]:1", "ipv6:%5B::1%5D:1"], [True]),
        ("ipv6:[::ffff:127.0.0.1]:1", True),
        *itertools.product(["ipv4:10.0.0.1:1", "ipv6:[::ffff:10.0.0.1]:1", "ipv6:[fe80::1%eth0]:1"], [False]),
        *itertools.product(["", "unix:", "unix:/tmp/x", "unknown", "ipv4:localhost:1"], [False]),
    ],
)
def test_only_addresses_of_the_loopback_network_are_of_this_host(peer, near):
    assert Access("0.0.0.0:1").is_near(peer) is near


def test_a_method_that_is_not_known_needs_the_highest_role():
    assert role_of("ringmesh.router.v1.RouterService/Added") is Role.ADMIN


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "router:1"])
def test_an_address_that_other_hosts_reach_without_identity_is_warned_of(address):
    assert "run inferences" in warning(address, has_keys=False)
    assert warning(address, has_keys=True) == ""


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost:1"])
def test_an_address_of_this_host_is_not_warned_of(address):
    assert warning(address, has_keys=False) == ""


def test_a_caller_without_an_address_is_near_if_only_this_host_reaches_the_server_and_is_an_admin_network():
    assert Access("127.0.0.1:1").is_near("unix:")
    assert not Access("127.0.0.1:1", ()).is_near("unix:")
    assert not Access("0.0.0.0:1").is_near("unix:")
