"""Whatever stands in the fields of a control call, the caller is told what is wrong with it: never INTERNAL."""

import asyncio

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.inference.api.control import ModelControl
from services.inference.api.shared_memory_service import SharedMemoryControl
from services.inference.codec.shared_memory import SharedMemory
from services.inference.models.model_store import MAX_FAILURES, Overrides
from services.runtime.errors import InvalidArgumentError, NotFoundError
from services.runtime.rpc.live_settings import LiveSettings
from services.runtime.telemetry.spans import this_process
from services.runtime.telemetry.tracing import Tracer
from tests import models
from tests.unit.inference.models.test_model_store import store

HOSTILE = [
    *("", ".", "..", "/", "1/..", "1/.", "1/", "../1/x", "/etc/passwd", "mlp", "a\0b", "1/a\0b", "a\0/b", "mlp/1"),
    *("-1", "1e400", "\u0661", "\uffff", "\r\n", "config", "{}", "{", '{"parameters": {"": {}}}'),
    *("x" * 300, "1/" + "x" * 300, "9" * 5000 + "/model.onnx", "9" * 5000),
    *('{"a":' * 5000, "input {" * 5000, "[" * 100_000),
    *('{"max_batch_size": 1e400}', f'{{"max_batch_size": {"9" * 5000}}}', f"max_batch_size: {'9' * 5000}"),
    *('{"name": "\\u0000"}', '{"default_model_filename": "1/.."}'),
    '{"version_policy": {"specific": {"versions": [9223372036854775807]}}}',
]
TEXT = st.sampled_from(HOSTILE) | st.text(max_size=40)
NUMBERS = st.sampled_from([0, 1, 4096, (1 << 63) - 1, (1 << 64) - 1])
OURS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


class AbortedError(Exception):
    """With the status."""


class Call:
    """What a handler is given beside the request."""

    async def abort(self, code, message="", trailing=()):
        raise AbortedError(code)


async def ask(handlers, method, request):
    """The status code that the call ends with."""
    try:
        await handlers[method].unary_unary(request.SerializeToString(), Call())
    except AbortedError as aborted:
        return aborted.args[0]
    return grpc.StatusCode.OK


PARAMETERS = st.dictionaries(
    TEXT | TEXT.map("file:".__add__) | st.just("config"),
    st.builds(v2.ModelRepositoryParameter, bytes_param=st.binary(max_size=10))
    | st.builds(v2.ModelRepositoryParameter, string_param=TEXT)
    | st.builds(v2.ModelRepositoryParameter, int64_param=st.integers(-(1 << 63), (1 << 63) - 1)),
    max_size=3,
)
VALUES = st.lists(TEXT | st.sampled_from(["OFF", "TIMESTAMPS", "0", "00", "7"]), max_size=2)
REQUESTS = st.one_of(
    st.builds(lambda *given: ("RepositoryModelLoad", load(*given)), TEXT, PARAMETERS),
    st.builds(lambda *given: ("RepositoryModelUnload", unload(*given)), TEXT, PARAMETERS),
    st.builds(lambda text: ("RepositoryIndex", v2.RepositoryIndexRequest(repository_name=text)), TEXT),
    st.builds(lambda *text: ("ModelConfig", v2.ModelConfigRequest(name=text[0], version=text[1])), TEXT, TEXT),
    st.builds(lambda *text: ("ModelStatistics", v2.ModelStatisticsRequest(name=text[0], version=text[1])), TEXT, TEXT),
    st.builds(lambda *given: ("TraceSetting", trace(*given)), st.dictionaries(TEXT | st.just("trace_rate"), VALUES)),
    st.builds(lambda *given: ("LogSettings", log(*given)), st.dictionaries(TEXT | st.just("log_info"), TEXT)),
    st.builds(lambda *given: ("SystemSharedMemoryRegister", region(*given)), TEXT, TEXT, NUMBERS, NUMBERS),
    st.builds(lambda text: ("SystemSharedMemoryStatus", v2.SystemSharedMemoryStatusRequest(name=text)), TEXT),
    st.builds(lambda text: ("SystemSharedMemoryUnregister", v2.SystemSharedMemoryUnregisterRequest(name=text)), TEXT),
    st.builds(lambda text: ("CudaSharedMemoryRegister", v2.CudaSharedMemoryRegisterRequest(name=text)), TEXT),
)


def load(name, parameters):
    return v2.RepositoryModelLoadRequest(model_name=name, parameters=parameters)


def unload(name, parameters):
    # But for what the other tests here rely on.
    return v2.RepositoryModelUnloadRequest(model_name=name if name != "mlp" else "", parameters=parameters)


def trace(values):
    value = v2.TraceSettingRequest.SettingValue
    return v2.TraceSettingRequest(settings={name: value(value=texts) for name, texts in values.items()})


def log(values):
    value = v2.LogSettingsRequest.SettingValue
    return v2.LogSettingsRequest(settings={name: value(string_param=text) for name, text in values.items()})


def region(name, key, offset, byte_size):
    return v2.SystemSharedMemoryRegisterRequest(name=name, key=key, offset=offset, byte_size=byte_size)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(run, handlers) of a worker."""
    folder = tmp_path_factory.mktemp("repository")
    models.mlp(folder)
    with asyncio.Runner() as runner:
        made = runner.run(store(folder))
        tracer = Tracer(this_process("worker"), 0.0, [])
        yield (
            runner.run,
            {
                **ModelControl(made).handlers(),
                **SharedMemoryControl(SharedMemory()).handlers(),
                **LiveSettings(tracer, lambda model: made.held.find(model, "")).handlers(),
            },
        )
        runner.run(made.close())


@given(call=REQUESTS)
@settings(max_examples=300, deadline=None)
def test_a_control_call_never_ends_with_internal_whatever_it_says(served, call):
    run, handlers = served
    assert run(ask(handlers, *call)) not in OURS


def with_file(name):
    return load("mlp", {"config": {"string_param": "{}"}, f"file:{name}": {"bytes_param": b"x"}})


def with_config(text):
    return load("mlp", {"config": {"string_param": text}})


WRONG = {
    "a file called 1/..": ("RepositoryModelLoad", with_file("1/..")),
    "a file with NUL": ("RepositoryModelLoad", with_file("1/a\0b")),
    "a file whose name is too long": ("RepositoryModelLoad", with_file("1/" + "x" * 300)),
    "a version of 5,000 digits": ("RepositoryModelLoad", with_file("9" * 5000 + "/model.onnx")),
    "a version of other digits": ("RepositoryModelLoad", with_file("\u0661/model.onnx")),
    "a model with NUL": ("RepositoryModelLoad", load("a\0b", {})),
    "a model with a line break": ("RepositoryModelLoad", load("a\nb", {})),
    "a model whose name is too long": ("RepositoryModelLoad", load("x" * 300, {})),
    "a configuration nested deeply": ("RepositoryModelLoad", with_config('{"a":' * 5000)),
    "protobuf text nested deeply": ("RepositoryModelLoad", with_config("input {" * 5000)),
    "a number of 5,000 digits": ("RepositoryModelLoad", with_config(f"max_batch_size: {'9' * 5000}")),
    "trace_rate of 5,000 digits": ("TraceSetting", trace({"trace_rate": ["9" * 5000]})),
    "trace_rate of other digits": ("TraceSetting", trace({"trace_rate": ["\u0661"]})),
    "a region with NUL": ("SystemSharedMemoryRegister", region("a\0b", "/x", 0, 1)),
    "a key with NUL": ("SystemSharedMemoryRegister", region("a", "/a\0b", 0, 1)),
    "a key called ..": ("SystemSharedMemoryRegister", region("a", "/..", 0, 1)),
    "a key that is too long": ("SystemSharedMemoryRegister", region("a", "/" + "x" * 300, 0, 1)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_name_or_number_is_an_invalid_argument(served, what):
    run, handlers = served
    assert run(ask(handlers, *WRONG[what])) == grpc.StatusCode.INVALID_ARGUMENT


async def test_names_of_no_model_are_not_remembered(tmp_path):
    models.mlp(tmp_path)
    made = await store(tmp_path)
    broken = Overrides(config="{}", files={"1/model.onnx": b"broken"})
    for overrides, refused in ((None, NotFoundError), (broken, InvalidArgumentError)):
        with pytest.raises(refused, match="failed to load 'nobody'"):
            await made.load("nobody", overrides)
        assert [line.name for line in await made.index()] == ["mlp"]
        with pytest.raises(NotFoundError):
            made.held.find("nobody", "")


async def test_models_that_cannot_be_loaded_are_remembered_up_to_a_bound(tmp_path):
    models.mlp(tmp_path)
    made = await store(tmp_path)
    for number in range(MAX_FAILURES + 10):
        (tmp_path / f"nobody{number}").mkdir()
        with pytest.raises(InvalidArgumentError):
            await made.load(f"nobody{number}")
    failed = [line.name for line in await made.index() if "no version" in line.reason]
    assert len(failed) == MAX_FAILURES
    assert f"nobody{MAX_FAILURES + 9}" in failed
    assert made.failures_dropped == 10
