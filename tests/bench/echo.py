"""Floors: servers that do nothing but answer, in one hop or two.

    python -m tests.bench.echo one-hop --port 9001 --response-bytes 900
    python -m tests.bench.echo two-hop --port 9002 --back 9003 --response-bytes 100

One hop is a fast path on the native engine that answers at once. Two hops go through the router's own WorkerClient to a
worker that answers each item of an envelope at once, over its Unix socket as wherever both are on one host.
"""

import argparse
import asyncio
import tempfile

import grpc
import uvloop
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from router.transport.worker_client import EnvelopeItem, WorkerClient
from router.transport.worker_load import WorkerLoad
from services.inference.api.envelope_socket import EnvelopeSocket
from services.runtime.oip.protocol import fast_path_handler
from services.runtime.rpc.rpc import Answer, Service
from services.runtime.rpc.server import Engine, Server


async def serve(arguments: argparse.Namespace) -> None:
    answer = bytes(arguments.response_bytes)
    link = WorkerClient(f"127.0.0.1:{arguments.back}", WorkerLoad())

    async def one_hop(data, metadata, deadline):
        return Answer(answer, ())

    async def two_hop(request, context):
        answered = asyncio.get_running_loop().create_future()
        link.send(b"", EnvelopeItem(request, b"", None, "", answered.set_result))
        return (await answered).response

    async def execute(data, metadata, deadline):
        items = inference_pb2.ExecuteRequest.FromString(data).items
        result = inference_pb2.WorkResult(response=answer)
        return Answer(inference_pb2.ExecuteResponse(results=[result] * len(items)).SerializeToString(), ())

    async def describe(request, context):
        described = inference_pb2.DescribeResponse(port=arguments.port, envelope_socket=path)
        return described.SerializeToString()

    inference = v2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    worker = inference_pb2.DESCRIPTOR.services_by_name["InferenceWorkerService"]
    service = {
        "one-hop": Service(inference, {"ModelInfer": fast_path_handler(one_hop)}, {"ModelInfer": one_hop}),
        "two-hop": Service(inference, {"ModelInfer": grpc.unary_unary_rpc_method_handler(two_hop)}),
        "back": Service(worker, {"Describe": grpc.unary_unary_rpc_method_handler(describe)}),
    }[arguments.kind]
    server = Server(
        Engine.NATIVE,
        f"127.0.0.1:{arguments.port}",
        [service],
        max_message_bytes=128 << 20,
        max_connection_age=3600,
    )
    if arguments.kind == "back":
        socket = EnvelopeSocket(tempfile.gettempdir(), execute, 128 << 20, lambda code: None)
        path = await socket.start()
    elif arguments.kind == "two-hop":
        await link.describe(5, 0)
    await server.start()
    server.set_serving(True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["one-hop", "two-hop", "back"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--back", type=int, default=0)
    parser.add_argument("--response-bytes", type=int, required=True)
    uvloop.run(serve(parser.parse_args()))


main()
