"""Semantic matches: if a model allows it, a request may get the answer to a similar one. Vectors are compared."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import numpy as np
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.keys.epochs import Epochs
from cache.keys.keys import RequestHasher
from cache.mesh import Found, Mesh
from cache.semantic.semantic_index import Vector
from cache.semantic.semantic_tier import SemanticTier
from cache.tiers.entry import Entry
from router.balancing.catalog import ModelEntry
from router.request.call import Call
from router.request.local_answers import takes
from services.runtime.driver import in_task
from services.runtime.errors import RingmeshError
from services.runtime.oip.tensors import DATATYPES, raw_from_contents

log = logging.getLogger(__name__)

_VECTORS = frozenset({"FP16", "FP32", "FP64"})


class SimilarityQuery(NamedTuple):
    """A request to compare: `vector` represents its inputs; `request` is the rest, which must be equal."""

    vector: Vector
    request: v2.ModelInferRequest


class SemanticMatches:
    """Finds answers to similar requests. `embed` runs a serialized request on an embedding model, as part of a call."""

    def __init__(
        self, mesh: Mesh, hasher: RequestHasher, embed: Callable[[bytes, Call], Awaitable[tuple[Entry, bytes]]]
    ) -> None:
        self._mesh = mesh
        self._hasher = hasher
        self._embed = embed
        self._tier = SemanticTier(mesh.shared)

    async def find(
        self, call: Call, model: ModelEntry, epochs: Epochs, find_exact: Callable[[], Awaitable[Found]]
    ) -> Found:
        """The answer to a sufficiently similar request, else the result of `find_exact`."""
        query_and_space = await self._query(call, model)
        if query_and_space is None:
            return await find_exact()
        query, space = query_and_space
        tenant = call.tenant if model.tenant_scoped else None
        (kind,) = self._hasher.hash_rows(query.request, [[b""] * len(query.request.inputs)], model.outputs, tenant)
        group = model.digest + kind + space + epochs.version.to_bytes(8, "little")
        found = await self._find_similar(call, model, group, query)
        if found is None:
            found = await find_exact()
            self._tier.add(group, query.vector, call.key)
        return found

    async def _query(self, call: Call, model: ModelEntry) -> tuple[SimilarityQuery, bytes] | None:
        """The query, and the digest of the embedding model (b"" if the model has none).

        None if the input is not a single vector, or if the embedding failed; the request then takes the exact path.
        """
        request = v2.ModelInferRequest.FromString(call.data)
        if not model.semantic_embedding:
            query = query_of(request)
            return None if query is None else (query, b"")
        data = to_embed(request, model.semantic_embedding)
        if data is None:
            return None
        try:
            answer, space = await self._embed(data, call)
        except RingmeshError as error:
            log.info("model %s: the request could not be embedded: %s", model.name, error.message)
            return None
        query = embedded(request, answer.value)
        return None if query is None else (query, space)

    async def _find_similar(self, call: Call, model: ModelEntry, group: bytes, query: SimilarityQuery) -> Found | None:
        """The answer to a sufficiently similar request; the exact answer if the shared tier has it."""
        near = await in_task(self._tier.nearest(group, query.vector, model.semantic_threshold))
        if near is None or near.key == call.key:
            return None
        subject = call.subject()
        exact = await self._mesh.look_up(call.key, subject, call.trace)
        if exact is not None and takes(None, model, exact):
            return Found(exact, "hit-shared")
        entry = await self._mesh.find(near.key, subject)
        if entry is None or not takes(None, model, entry):
            return None
        return Found(entry, "hit-semantic", similarity=near.similarity)


def query_of(request: v2.ModelInferRequest) -> SimilarityQuery | None:
    """The query of a model whose input is compared. None unless that is one vector of floating-point numbers."""
    if len(request.inputs) != 1:
        return None
    tensor = request.inputs[0]
    raw = request.raw_input_contents[0] if request.raw_input_contents else raw_from_contents(tensor)
    return _query(request, tensor.datatype, tensor.shape, raw)


def to_embed(request: v2.ModelInferRequest, model: str) -> bytes | None:
    """A request for the embedding model with the same inputs; None unless they have one row."""
    if not request.inputs or any(tensor.shape and tensor.shape[0] != 1 for tensor in request.inputs):
        return None
    to_model = v2.ModelInferRequest(model_name=model, inputs=request.inputs)
    to_model.raw_input_contents.extend(request.raw_input_contents)
    return to_model.SerializeToString()


def embedded(request: v2.ModelInferRequest, answer: bytes) -> SimilarityQuery | None:
    """The query from the embedding model's first output. None unless that is one vector of floating-point numbers.

    Removes the shapes from `request`; they depend on the length of a text.
    """
    response = v2.ModelInferResponse.FromString(answer)
    if not response.outputs or not response.raw_output_contents:
        return None
    for tensor in request.inputs:
        del tensor.shape[:]
    output = response.outputs[0]
    return _query(request, output.datatype, output.shape, response.raw_output_contents[0])


def _query(request: v2.ModelInferRequest, datatype: str, shape: Sequence[int], raw: bytes) -> SimilarityQuery | None:
    """Removes the data and the id from `request`."""
    if datatype not in _VECTORS or (len(shape) > 1 and shape[0] != 1):
        return None
    kind = DATATYPES[datatype]
    if len(raw) != kind.itemsize * np.prod(shape, dtype=np.int64):
        return None
    vector = np.frombuffer(raw, kind.dtype)
    del request.raw_input_contents[:]
    for tensor in request.inputs:
        tensor.ClearField("contents")
    request.ClearField("id")
    return SimilarityQuery(vector, request)
