"""What makes two requests the same request.

A key is the digest of the model version that answers (16 bytes) followed by the hash of the request's
canonical content (16 bytes). The content is every input's name, datatype, shape, raw bytes and
parameters, the set of requested outputs with theirs, and every request parameter that is not reserved.
It leaves out what cannot change the answer: id, trace context, priority, timeout, the order of inputs
and of fields, unknown fields, and whether tensors travel raw or typed.
"""

from __future__ import annotations

from collections.abc import Mapping

from blake3 import blake3
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.tensors import raw_from_contents

# Keyed, so that nobody outside the fleet can search for two inputs with one hash.
_CONTEXT = "ringmesh 2026-11 request hash"
_RESERVED = frozenset({"priority", "timeout", "headers", "binary_data_output", "binary_data"})
# A sequence_id that is 0 or "" means that there is none.
_RESERVED_PREFIXES = ("triton_", "sequence_")


class UncacheableError(Exception):
    """The request must be computed; the message says why."""


class RequestHasher:
    """Hashes requests under one fleet-wide secret: every router must be given the same."""

    def __init__(self, secret: str) -> None:
        self._key = blake3(secret.encode(), derive_key_context=_CONTEXT).digest()

    def hash(self, request: v2.ModelInferRequest) -> bytes:
        """16 bytes that equal requests share, whatever the model. Model name and version are not in it.

        Raises UncacheableError for sequences, shared memory, and tensors without one plain value,
        which only the worker can judge.
        """
        raws = request.raw_input_contents
        if raws and len(raws) != len(request.inputs):
            raise UncacheableError("raw_input_contents does not match the inputs")
        parameters = request.parameters
        if parameters:
            _refuse_sequences(parameters)
        header = _parameters(parameters) if parameters else ""
        outputs = request.outputs
        if outputs:
            header += "".join(sorted(f"{len(o.name)}:{o.name}{_parameters(o.parameters)};" for o in outputs))
        tensors = []
        for index, tensor in enumerate(request.inputs):
            if not raws:
                raw = raw_from_contents(tensor)
            elif tensor.HasField("contents"):
                raise UncacheableError("raw and typed contents together")
            else:
                raw = raws[index]
            tensors.append((_describe(tensor, len(raw)), raw))
        if len(tensors) != 1:
            tensors.sort()
        # The data first: BLAKE3 is twice as fast where it starts at a chunk boundary. The descriptions hold its sizes.
        hasher = blake3(tensors[0][1] if tensors else b"", key=self._key)
        for _, raw in tensors[1:]:
            hasher.update(raw)
        description = f"{''.join([description for description, _ in tensors])}|{header}".encode()
        # With its length at the end, no data can pass for a part of it.
        return hasher.update(description + len(description).to_bytes(4, "little")).digest(16)


def cache_key(model_digest: bytes, request_hash: bytes) -> bytes:
    """32 bytes: the answer of this model version to this request."""
    return model_digest + request_hash


def _describe(tensor: v2.ModelInferRequest.InferInputTensor, size: int) -> str:
    """Lengths stand before names, so that no two lists of tensors read the same."""
    parameters = _parameters(tensor.parameters) if tensor.parameters else ""
    return (
        f"{len(tensor.name)}:{tensor.name}{len(tensor.datatype)}:{tensor.datatype}{[*tensor.shape]}{parameters}{size};"
    )


def _parameters(parameters: Mapping[str, v2.InferParameter]) -> str:
    parts = []
    for name in sorted(parameters):
        if name in _RESERVED or name.startswith(_RESERVED_PREFIXES):
            continue
        if name.startswith("shared_memory"):
            raise UncacheableError("the tensor is in shared memory")
        kind = parameters[name].WhichOneof("parameter_choice")
        value = getattr(parameters[name], kind) if kind else None
        parts.append(f"{len(name)}:{name}={kind}:{value!r},")
    return "".join(parts)


def _refuse_sequences(parameters: Mapping[str, v2.InferParameter]) -> None:
    if "sequence_id" not in parameters:
        return
    sequence = parameters["sequence_id"]
    if sequence.int64_param or sequence.string_param or sequence.uint64_param:
        raise UncacheableError("it belongs to a sequence")
