"""The part of the v2 protocol that manages models: configuration, statistics, index, load and unload."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, MutableMapping
from typing import Any

from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.models.decisions import overrides_of
from services.inference.models.model_store import READY, ModelStore
from services.runtime.errors import InvalidArgumentError
from services.runtime.oip.protocol import DECIDED_NS
from services.runtime.request_limits import check_list
from services.runtime.rpc.rpc import Context, Handler, unary

# In the year 2116.
_LAST_NS = 1 << 62


class ModelControl:
    """Handlers that manage the models of a ModelStore."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._changes: set[asyncio.Task[None]] = set()

    def handlers(self) -> dict[str, Handler]:
        return {
            "ModelConfig": unary(v2.ModelConfigRequest, self._config),
            "ModelStatistics": unary(v2.ModelStatisticsRequest, self._statistics),
            "RepositoryIndex": unary(v2.RepositoryIndexRequest, self._index),
            "RepositoryModelLoad": unary(v2.RepositoryModelLoadRequest, self._load, check_list),
            "RepositoryModelUnload": unary(v2.RepositoryModelUnloadRequest, self._unload),
        }

    async def _config(self, request: v2.ModelConfigRequest, _: Context) -> v2.ModelConfigResponse:
        return v2.ModelConfigResponse(config=self._store.held.find(request.name, request.version).model.config())

    async def _statistics(self, request: v2.ModelStatisticsRequest, _: Context) -> v2.ModelStatisticsResponse:
        held = self._store.held
        if request.name and request.version:
            chosen = [held.find(request.name, request.version)]
        elif request.name:
            held.find(request.name, "")
            chosen = held.of(request.name)
        else:
            chosen = list(held)
        return v2.ModelStatisticsResponse(model_stats=[model.statistics.message() for model in chosen])

    async def _index(self, request: v2.RepositoryIndexRequest, _: Context) -> v2.RepositoryIndexResponse:
        _only_one_repository(request.repository_name)
        lines = await self._store.index()
        return v2.RepositoryIndexResponse(models=[line for line in lines if line.state == READY or not request.ready])

    async def _load(self, request: v2.RepositoryModelLoadRequest, _: Context) -> v2.RepositoryModelLoadResponse:
        _only_one_repository(request.repository_name)
        decided_ns = _decided_ns(request.parameters)
        change = self._store.load(request.model_name, overrides_of(request), pardon=True, decided_ns=decided_ns)
        await self._to_the_end(change)
        return v2.RepositoryModelLoadResponse()

    async def _unload(self, request: v2.RepositoryModelUnloadRequest, _: Context) -> v2.RepositoryModelUnloadResponse:
        _only_one_repository(request.repository_name)
        decided_ns = _decided_ns(request.parameters)
        dependents = False
        for name, parameter in request.parameters.items():
            if name != "unload_dependents":
                raise InvalidArgumentError(f"no parameter {name!r}; there is unload_dependents", field="parameters")
            if parameter.WhichOneof("parameter_choice") != "bool_param":
                raise InvalidArgumentError(
                    "unload_dependents must be true or false, in bool_param", field="parameters.unload_dependents"
                )
            dependents = parameter.bool_param
        await self._to_the_end(self._store.unload(request.model_name, dependents=dependents, decided_ns=decided_ns))
        return v2.RepositoryModelUnloadResponse()

    async def _to_the_end(self, change: Coroutine[Any, Any, None]) -> None:
        """Waits for a change. If cancelled, the change still runs to its end."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)


def _decided_ns(parameters: MutableMapping[str, v2.ModelRepositoryParameter]) -> int:
    """Removes and returns the time at which a router says the fleet decided; 0 if no router is asking."""
    if DECIDED_NS not in parameters:
        return 0
    decided_ns = parameters[DECIDED_NS].int64_param
    del parameters[DECIDED_NS]
    # Dates far ahead are valid: they come after the decision of a worker or router whose clock is wrong.
    if not 0 < decided_ns <= _LAST_NS:
        raise InvalidArgumentError(
            f"{DECIDED_NS} is {decided_ns}, but must be from 1 to {_LAST_NS}, in Unix nanoseconds",
            field=f"parameters[{DECIDED_NS}]",
        )
    return decided_ns


def _only_one_repository(name: str) -> None:
    if name:
        raise InvalidArgumentError("a worker has one repository; leave repository_name out", field="repository_name")
