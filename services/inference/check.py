"""`python -m services.inference.check REPOSITORY [AFTER]`: loads each model and describes it as a line of JSON.

Before each model a line {"checking": name} is written, so that the reader knows the model that ended the process. With
AFTER, the models up to that name are left out. Exits with 2 if the repository cannot be read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import ValidationError

from services.inference.codec.tensor_spec import TensorSpec
from services.inference.main import model_opener
from services.inference.models import model_store
from services.inference.models.held_models import HeldModel
from services.inference.models.model_store import ModelStore
from services.inference.repository import config, repository
from services.inference.repository.config import ConfigError
from services.inference.repository.repository import ModelSource, RepositoryError
from services.inference.settings import WorkerSettings
from services.runtime.errors import RingmeshError
from services.runtime.process.settings import describe
from services.runtime.rpc.server import StartError

# The store measures memory only under a limit.
_NO_LIMIT = 1 << 62


class _Warnings(logging.Handler):
    """Collects the warnings about the model that is loaded, without ignored fields, which are reported as such."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.name != model_store.__name__ and text not in self.texts:
            self.texts.append(text)


async def _check(settings: WorkerSettings, after: str, out: int) -> None:
    source = await asyncio.to_thread(settings.model_source)
    names = await asyncio.to_thread(source.names)
    signatures = settings.signatures()
    with ThreadPoolExecutor() as executor:
        limit = settings.model_memory_bytes or _NO_LIMIT
        store = ModelStore(source, model_opener(settings), executor, memory_limit=limit, signatures=signatures)
        warnings = _Warnings()
        logging.getLogger().addHandler(warnings)
        for name in sorted(name for name in names if name > after):
            _write(out, {"checking": name})
            warnings.texts = []
            described = await _describe(store, source, name)
            _write(out, {"name": name, **described, "warnings": warnings.texts})
        await store.close()


async def _describe(store: ModelStore, source: ModelSource, name: str) -> dict[str, Any]:
    described: dict[str, Any] = {}
    try:
        folder = await asyncio.to_thread(source.fetch, name, None)
        (*_, files) = versions = await asyncio.to_thread(repository.versions, folder, name)
        fields = config.fields(files.config)
        described = {
            "versions": [version.version for version in versions],
            "fields_used": [field for field, used in fields.items() if used],
            "fields_ignored": [field for field, used in fields.items() if not used],
        }
        # Steps of an ensemble that fail are reported by the ensemble, and on their own.
        steps = {step.model_name for step in files.config.ensemble_scheduling.step}
        await asyncio.gather(*(store.load(step) for step in steps), return_exceptions=True)
        await store.load(name)
        described |= _served(store.held.find(name, ""))
    except (RepositoryError, ConfigError) as error:
        described["error"] = str(error)
    except RingmeshError as error:
        described["error"] = error.message
    for held in {held.model.name for held in store.held}:
        await store.unload(held)
    return described


def _served(held: HeldModel) -> dict[str, Any]:
    model = held.model
    return {
        "error": model.runnable.reason,
        "inputs": _tensors(model.inputs.values()),
        "outputs": _tensors(model.outputs.values()),
        "sequence": model.config().HasField("sequence_batching"),
        "provider": model.provider,
        "batching": model.batch_remark,
        "cached": bool(model.cacheable),
        "not_cached_because": model.cacheable.reason,
        "memory_bytes": None if held.resident is None else held.resident.bytes,
    }


def _tensors(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    return [
        {"name": spec.name, "datatype": spec.datatype.name, "shape": spec.shape, "optional": spec.optional}
        for spec in specs
    ]


def _write(out: int, line: dict[str, Any]) -> None:
    os.write(out, f"{json.dumps(line)}\n".encode())


def main() -> None:
    repository_name, *after = sys.argv[1:]
    # What libraries print goes to stderr.
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        settings = WorkerSettings(models=repository_name)
        asyncio.run(_check(settings, "".join(after), out))
    except (ValidationError, StartError, RepositoryError) as error:
        print(f"check: {describe(error) if isinstance(error, ValidationError) else error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
