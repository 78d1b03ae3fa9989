"""What makes two requests the same request.

A key is the digest of the model version that answers (16 bytes) followed by the hash of the request's
canonical content (16 bytes). The content is every input's name, datatype, shape, raw bytes and
parameters, the set of requested outputs with theirs, and every request parameter that is not reserved.
It leaves out what cannot change the answer: id, trace context, priority, timeout, the order of inputs
and of fields, unknown fields, and whether tensors travel raw or typed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from blake3 import blake3
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.protocol import sequence_of
from services.runtime.tensors import raw_from_contents

# Keyed, so that nobody outside the fleet can search for two inputs with one hash.
_CONTEXT = "ringmesh 2026-11 request hash"
_RESERVED = frozenset({"priority", "timeout", "headers", "binary_data_output", "binary_data"})
_MAX_DESCRIBED = 4096
_RESERVED_PREFIXES = ("triton_", "sequence_")


class UncacheableError(Exception):
    """The request must be computed; the message says why."""


class RequestHasher:
    """Hashes requests under one fleet-wide secret: every router must be given the same."""

    def __init__(self, secret: str) -> None:
        self._key = blake3(secret.encode(), derive_key_context=_CONTEXT).digest()
        # Callers send few kinds of requests: what a request is, but for its data and id, is described once.
        self._described: dict[bytes, _Description] = {}

    def sequence_place(self, model_name: str, sequence: int | str) -> bytes:
        """A place on the ring, the same for every request of a sequence."""
        return blake3(f"{model_name}/{sequence!r}".encode(), key=self._key).digest(16)

    def hash(self, request: v2.ModelInferRequest) -> bytes:
        """16 bytes that equal requests share, whatever the model. Model name and version are not in it.

        Takes the id and the raw contents out of `request`. Raises UncacheableError for sequences, shared memory, and
        tensors without one plain value, which only the worker can judge.
        """
        raws: list[bytes] = [*request.raw_input_contents]
        if raws:
            del request.raw_input_contents[:]
        request.ClearField("id")
        if raws:
            head = request.SerializeToString()
            description = self._described.get(head)
            if description is None:
                if len(self._described) >= _MAX_DESCRIBED:
                    self._described.clear()
                description = self._described[head] = _describe(request, len(raws), typed=False)
        else:
            raws = [raw_from_contents(tensor) for tensor in request.inputs]
            description = _describe(request, len(raws), typed=True)
        if description.order:
            raws = [raws[index] for index in description.order]
        # The data first: BLAKE3 is twice as fast where it starts at a chunk boundary. What follows can be read from
        # its end, so no data can pass for a part of it.
        hasher = blake3(raws[0], key=self._key)
        sizes = len(raws[0]).to_bytes(8, "little")
        for raw in raws[1:]:
            hasher.update(raw)
            sizes += len(raw).to_bytes(8, "little")
        return hasher.update(sizes + description.trailer).digest(16)


class _Description(NamedTuple):
    """`order`: the inputs sorted by name, () where they are. `trailer`: all but data and sizes, then its length."""

    order: tuple[int, ...]
    trailer: bytes


def _describe(request: v2.ModelInferRequest, raw_count: int, *, typed: bool) -> _Description:
    """Lengths stand before names, so that no two requests read the same."""
    if not request.inputs:
        raise UncacheableError("it has no inputs")
    if raw_count != len(request.inputs):
        raise UncacheableError("raw_input_contents does not match the inputs")
    if sequence_of(request):
        raise UncacheableError("it belongs to a sequence")
    tensors = []
    for tensor in request.inputs:
        if not typed and tensor.HasField("contents"):
            raise UncacheableError("raw and typed contents together")
        parameters = _parameters(tensor.parameters)
        tensors.append(
            f"{len(tensor.name)}:{tensor.name}{len(tensor.datatype)}:{tensor.datatype}{[*tensor.shape]}{parameters}"
        )
    outputs = sorted(f"{len(o.name)}:{o.name}{_parameters(o.parameters)}" for o in request.outputs)
    order = tuple(sorted(range(len(tensors)), key=tensors.__getitem__))
    text = ";".join(
        [*(tensors[index] for index in order), "|", *outputs, "|", _parameters(request.parameters)]
    ).encode()
    return _Description(order if order != tuple(range(len(order))) else (), text + len(text).to_bytes(4, "little"))


def cache_key(model_digest: bytes, request_hash: bytes) -> bytes:
    """32 bytes: the answer of this model version to this request."""
    return model_digest + request_hash


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
