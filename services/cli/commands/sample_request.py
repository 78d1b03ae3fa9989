"""A sample request for any model, as a message and as commands for grpcurl and Triton's client."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf import json_format
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from ringmesh.oip.v2 import grpc_service_pb2_grpc

from services.cli.commands import shell
from services.cli.stack.local_ca import CA
from services.runtime.oip import tensors
from services.runtime.oip.sample_tensor import fill
from services.runtime.rpc.tls import TlsFiles

# Larger inputs are piped to grpcurl, because a shell limits the length of an argument.
_MOST_ELEMENTS = 256


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A request of zeros; strings are "0", and dynamic dimensions are 1. `sequence`: the model serves sequences."""

    model: str
    inputs: Sequence[v2.ModelMetadataResponse.TensorMetadata]
    outputs: Sequence[str]
    sequence: bool = False

    def message(self, values: str = "zeros") -> v2.ModelInferRequest:
        """Returns the request with raw contents; `values` as in sample_tensor.fill."""
        request = v2.ModelInferRequest(model_name=self.model)
        for tensor in self.inputs:
            shape = [max(1, size) for size in tensor.shape]
            request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
            request.raw_input_contents.append(tensors.encode(fill(values, tensor.datatype, shape)))
        if self.sequence:
            request.parameters["sequence_id"].int64_param = 1
            request.parameters["sequence_start"].bool_param = True
        return request

    def grpcurl(self, router: str, header: str = "", tls: TlsFiles | None = None, *, has_keys: bool = False) -> str:
        """Returns a command that sends the request to `router`, host:port.

        `has_keys`: callers need a key, which is read from RINGMESH_API_KEY.
        """
        request = self.message()
        raw = [*request.raw_input_contents]
        request.ClearField("raw_input_contents")
        transport = "-plaintext" if tls is None else f"-cacert {shlex.quote(str(_ca(tls)))}"
        if tls is not None and tls.client_ca is not None:
            transport += " -cert client.pem -key client-key.pem"
        command = f"{shell.script('grpcurl')} {transport}" + (f" -H {shlex.quote(header)}" if header else "")
        command += ' -H "authorization: Bearer $RINGMESH_API_KEY"' if has_keys else ""
        method = f"{router} inference.GRPCInferenceService/ModelInfer"
        contents = [self._contents(tensor) for tensor in request.inputs]
        if None not in contents:
            for tensor, (field, values) in zip(request.inputs, filter(None, contents), strict=True):
                getattr(tensor.contents, field).extend(values)
            data = json_format.MessageToDict(request, preserving_proto_field_name=True)
            return f"{command} \\\n  -d {shlex.quote(json.dumps(data, separators=(',', ':')))} \\\n  {method}"
        data = json_format.MessageToDict(request, preserving_proto_field_name=True)
        lines = [
            "import base64, json",
            f"request = {data!r}",
            f"raw = [{', '.join(_expression(each) for each in raw)}]",
            'request["raw_input_contents"] = [base64.b64encode(each).decode() for each in raw]',
            "print(json.dumps(request))",
        ]
        return shell.python(lines, then=f"{command} -d @ {method}")

    def python(self, router: str, tls: TlsFiles | None = None, *, has_keys: bool = False) -> str:
        bfloat16 = "ml_dtypes, " if any(tensor.datatype == "BF16" for tensor in self.inputs) else ""
        lines = [f"import {bfloat16}numpy as np, tritonclient.grpc as triton", "inputs = []"]
        for tensor in self.inputs:
            shape = [max(1, size) for size in tensor.shape]
            dtype = tensors.DATATYPES[tensor.datatype].dtype.name
            named = "ml_dtypes.bfloat16" if dtype == "bfloat16" else repr(dtype)
            values = f"np.full({shape}, b'0', object)" if dtype == "object" else f"np.zeros({shape}, {named})"
            lines += [
                f"inputs.append(triton.InferInput({tensor.name!r}, {shape}, {tensor.datatype!r}))",
                f"inputs[-1].set_data_from_numpy({values})",
            ]
        security = f", ssl=True, root_certificates={str(_ca(tls))!r}" if tls is not None else ""
        if tls is not None and tls.client_ca is not None:
            security += ", certificate_chain='client.pem', private_key='client-key.pem'"
        options = ", sequence_id=1, sequence_start=True" if self.sequence else ""
        if has_keys:
            lines.insert(0, "import os")
            options += ", headers={'authorization': 'Bearer ' + os.environ['RINGMESH_API_KEY']}"
        return shell.python(
            [
                *lines,
                f"client = triton.InferenceServerClient({router!r}{security})",
                f"answer = client.infer({self.model!r}, inputs{options})",
                *(f"print({name!r}, answer.as_numpy({name!r}))" for name in self.outputs),
            ]
        )

    def _contents(self, tensor: v2.ModelInferRequest.InferInputTensor) -> tuple[str, list[object]] | None:
        """Returns the field of typed contents and its values; None if the tensor needs raw contents."""
        field = tensors.DATATYPES[tensor.datatype].contents
        array = fill("zeros", tensor.datatype, tensor.shape)
        return (field, array.ravel().tolist()) if field and array.size <= _MOST_ELEMENTS else None


def sample(channel: grpc.Channel, model: str) -> SampleRequest:
    """Returns a request for a model that a router serves. Raises grpc.RpcError."""
    stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    metadata = stub.ModelMetadata(v2.ModelMetadataRequest(name=model))
    config = stub.ModelConfig(v2.ModelConfigRequest(name=model)).config
    outputs = [tensor.name for tensor in metadata.outputs]
    return SampleRequest(model, metadata.inputs, outputs, config.HasField("sequence_batching"))


def _ca(tls: TlsFiles) -> Path:
    """The CA that `ringmesh up` made, or the certificate of the server, which callers may know too."""
    own = tls.certificate.with_name(CA)
    return own if own.exists() else tls.certificate


def _expression(raw: bytes) -> str:
    return f"bytes({len(raw)})" if not any(raw) else f"{raw[:5]!r} * {len(raw) // 5}"
