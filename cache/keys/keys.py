"""Cache keys: equal requests have equal keys.

A key is the digest of the model version that answers (16 bytes) followed by the hash of the request's canonical
content (16 bytes). The content is every input's name, datatype, shape, raw bytes and parameters, the set of requested
outputs with their parameters, every request parameter that is not reserved, and the tenant if the model is
tenant-scoped.
The content excludes everything that cannot change the answer: id, trace context, priority, timeout, the order of
inputs and of fields, unknown fields, whether tensors are raw or typed, and whether all outputs are named or none.
Tiers compare all 32 bytes on a hit: a dict by equality, Redis by its own key and by the frame's checksum.
"""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from blake3 import blake3
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.oip.infer_request import MAX_HEAD, Read
from services.runtime.oip.protocol import sequence_of
from services.runtime.oip.tensors import raw_from_contents
from services.runtime.telemetry.metrics import Sample
from services.runtime.telemetry.recent import Recent, forgotten

# The hash is keyed, so that nobody outside the fleet can search for two inputs with the same hash.
_CONTEXT = "ringmesh 2026-11 request hash"
# Length of a key: digest and hash.
KEY_BYTES = 32
_RESERVED = frozenset({"priority", "timeout", "headers", "binary_data_output", "binary_data"})
_MAX_DESCRIBED = 4096
_RESERVED_PREFIXES = ("triton_", "sequence_")


class UncacheableError(Exception):
    """The answer to the request cannot be cached; the message says why."""


class RequestHasher:
    """Hashes requests under one fleet-wide secret, which must be the same on every router.

    `tenant_epoch` returns a number for a tenant that grows with each purge of that tenant.
    """

    def __init__(self, secret: str, tenant_epoch: Callable[[str], int] = lambda _: 0) -> None:
        self._tenant_epoch = tenant_epoch
        self._key = blake3(secret.encode(), derive_key_context=_CONTEXT).digest()
        # Callers send few kinds of requests. Everything in a request except its data and id is described once.
        self.described: Recent[bytes, _Description] = Recent(_MAX_DESCRIBED)
        self.tenant_keys: Recent[tuple[str, int], bytes] = Recent(_MAX_DESCRIBED)

    def samples(self) -> Iterator[Sample]:
        yield forgotten("descriptions", self.described)
        yield forgotten("tenant keys", self.tenant_keys)

    def sequence_ring_hash(self, model_name: str, sequence: int | str) -> bytes:
        """Returns a ring hash that is the same for every request of a sequence."""
        return blake3(f"{model_name}/{sequence!r}".encode(), key=self._key).digest(16)

    def hash(self, request: v2.ModelInferRequest, outputs: Collection[str] = (), tenant: str | None = None) -> bytes:
        """Returns a 16-byte hash that equal requests share. The hash excludes the model's name and version.

        `outputs` are the outputs of the model: a request for all of them equals a request that names none. The hash
        includes `tenant` unless it is None. Removes the id and the raw contents from `request`. Raises UncacheableError
        for sequences, shared memory, and tensors without one plain value, which only the worker can validate.
        """
        raws: list[bytes] = [*request.raw_input_contents]
        if raws:
            del request.raw_input_contents[:]
        request.ClearField("id")
        if raws:
            return self._hash_parts(request.SerializeToString(), request, raws, outputs, tenant)
        raws = [raw_from_contents(tensor) for tensor in request.inputs]
        description = _describe(request, len(raws), outputs, typed=True)
        return self._digest(raws, description, self._key if tenant is None else self._tenant_key(tenant))

    def hash_read(self, read: Read, outputs: Collection[str] = (), tenant: str | None = None) -> bytes:
        """Returns the same as `hash`, for a request that was already parsed."""
        message, parts = read.head.message, read.parts
        if parts is None:
            return self.hash(message, outputs, tenant)
        return self._hash_parts(parts.head, message, parts.raws, outputs, tenant)

    def _hash_parts(
        self,
        head: bytes,
        request: v2.ModelInferRequest,
        raws: Sequence[bytes],
        outputs: Collection[str],
        tenant: str | None,
    ) -> bytes:
        """Hashes `raws` and the rest of the request: `request`, or `head` in serialized form."""
        description = self.described.get(head)
        if description is None or description.outputs is not outputs or description.inputs != len(raws):
            description = _describe(request, len(raws), outputs, typed=False)
            if len(head) <= MAX_HEAD:
                self.described.put(head, description)
        return self._digest(raws, description, self._key if tenant is None else self._tenant_key(tenant))

    def hash_rows(
        self,
        request: v2.ModelInferRequest,
        rows: Sequence[Sequence[bytes]],
        outputs: Collection[str] = (),
        tenant: str | None = None,
    ) -> list[bytes]:
        """Returns the hash that each row would have as a request of its own. A row is the raw contents of all inputs.

        `request` is a request for one row, without its data. Raises UncacheableError.
        """
        description = _describe(request, len(request.inputs), outputs, typed=False)
        key = self._key if tenant is None else self._tenant_key(tenant)
        return [self._digest(row, description, key) for row in rows]

    def _digest(self, raws: Sequence[bytes], description: _Description, key: bytes) -> bytes:
        if description.order:
            raws = [raws[index] for index in description.order]
        # Data comes first, because BLAKE3 is twice as fast if the data starts at a chunk boundary. The rest can be
        # parsed from its end, so data cannot be mistaken for a part of it.
        hasher = blake3(raws[0], key=key)
        if len(raws) == 1:
            return hasher.update(len(raws[0]).to_bytes(8, "little") + description.trailer).digest(16)
        for raw in raws[1:]:
            hasher.update(raw)
        sizes = b"".join([len(raw).to_bytes(8, "little") for raw in raws])
        return hasher.update(sizes + description.trailer).digest(16)

    def _tenant_key(self, tenant: str) -> bytes:
        epoch = self._tenant_epoch(tenant)
        key = self.tenant_keys.get((tenant, epoch))
        if key is None:
            name = f"{tenant}\0{epoch}" if epoch else tenant
            key = blake3(name.encode(), key=self._key).digest()
            self.tenant_keys.put((tenant, epoch), key)
        return key


class _Description(NamedTuple):
    """Everything in a request except its data.

    `order`: indices of the inputs sorted by name, () if they are sorted already. `trailer`: everything except data and
    sizes, then its own length. `outputs`: the outputs of the model it was made for. `inputs`: number of inputs with
    raw contents.
    """

    order: tuple[int, ...]
    trailer: bytes
    outputs: Collection[str]
    inputs: int


def _describe(
    request: v2.ModelInferRequest, raw_count: int, model_outputs: Collection[str], *, typed: bool
) -> _Description:
    """Describes a request. Lengths precede names, so that different requests have different descriptions."""
    if not request.inputs:
        raise UncacheableError("it has no inputs")
    if raw_count != len(request.inputs):
        raise UncacheableError("raw_input_contents does not match the inputs")
    if sequence_of(request):
        raise UncacheableError("it belongs to a sequence")
    tensors = []
    for tensor in request.inputs:
        if not typed and tensor.contents.ByteSize():
            raise UncacheableError("raw and typed contents together")
        parameters = _parameters(tensor.parameters)
        tensors.append(
            f"{len(tensor.name)}:{tensor.name}{len(tensor.datatype)}:{tensor.datatype}{[*tensor.shape]}{parameters}"
        )
    outputs = sorted(_output(output.name, _parameters(output.parameters)) for output in request.outputs)
    if model_outputs and outputs == sorted(_output(name) for name in model_outputs):
        outputs = []
    order = tuple(sorted(range(len(tensors)), key=tensors.__getitem__))
    text = ";".join(
        [*(tensors[index] for index in order), "|", *outputs, "|", _parameters(request.parameters)]
    ).encode()
    trailer = text + len(text).to_bytes(4, "little")
    return _Description(order if order != tuple(range(len(order))) else (), trailer, model_outputs, raw_count)


def _output(name: str, parameters: str = "") -> str:
    return f"{len(name)}:{name}{parameters}"


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
