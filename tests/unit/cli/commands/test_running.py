"""Calls of commands to processes."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc

from services.cli.commands import running
from services.cli.errors import CommandError


def test_a_call_without_a_key_is_told_which_variable_has_it():
    class Closed(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
        def ServerLive(self, request, context):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "this needs an API key")

    server = grpc.server(ThreadPoolExecutor(1))
    grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Closed(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    call = lambda channel: grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(v2.ServerLiveRequest())  # noqa: E731
    with pytest.raises(CommandError, match="UNAUTHENTICATED: this needs an API key; RINGMESH_API_KEY has the key"):
        running.ask(f"127.0.0.1:{port}", "router", call)
    server.stop(0)
