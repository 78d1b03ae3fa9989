"""Models of tests.models as a worker loads them."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from services.inference.execution.loading import load_model
from services.inference.models.model_store import ModelStore
from services.inference.repository.repository import Directory, versions

EXECUTOR = ThreadPoolExecutor(2)


def open_model(files, providers=("CPUExecutionProvider",), max_batch_rows=8):
    return load_model(files, providers=providers, intra_op_threads=1, max_batch_rows=max_batch_rows)


def load(folder, *options, **named):
    (files,) = versions(folder.parent.parent, folder.parent.name)
    return open_model(files, *options, **named)


async def store(repository, **options):
    made = ModelStore(Directory(repository), partial(open_model, **options), EXECUTOR)
    await made.load_all()
    return made
