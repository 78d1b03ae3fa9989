"""The limits of docs/operations.md: each is the one of the code; just below it passes, just above it is refused."""

import asyncio
import re
from pathlib import Path

import pytest
from blake3 import blake3
from ringmesh.cache.v1 import cache_pb2
from ringmesh.ledger.v1 import ledger_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cache.api import service as cache_service
from cache.policy import cache_control
from services.console.pages import form
from services.inference.codec import request as codec_request
from services.inference.codec import shared_memory
from services.inference.repository import config_rules, repository
from services.inference.repository.config import ConfigError
from services.ledger.api import service as ledger_service
from services.ledger.ingest import batch
from services.ledger.reports import advice, time_range
from services.ledger.storage.times import DAY_MS, HOUR_MS
from services.runtime import request_limits, w3c, wire
from services.runtime.errors import InvalidArgumentError, ResourceExhaustedError
from services.runtime.oip import protocol, request_check
from services.runtime.rpc import exposition, rpc, server
from services.runtime.telemetry.metrics import Metrics
from tests.unit.ledger.empty_ledger import LEDGER

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"
AT_MS = 1_764_000_000_000
BATCH = {name: most for name, _, most in batch._ENTRIES}
REFUSED = (InvalidArgumentError, ResourceExhaustedError, ConfigError)


def request(**fields):
    return v2.ModelInferRequest(model_name="m", **fields)


def check(made, shape=(-1,)):
    request_check.check_request(made, "m", {"x": ("BYTES", shape)}, ["y"])


def with_parameters(count):
    made = request()
    for number in range(count):
        made.parameters[str(number)].bool_param = True
    return made


def with_shape(*shape, datatype="BYTES"):
    made = request()
    made.inputs.add(name="x", datatype=datatype, shape=shape)
    return made


def check_elements(count):
    request_check.check_shape([count], [-1], "x", 0)


def check_empty(count):
    request_check.check_shape([count, 0], [-1, -1], "x", 0)


def check_purge(size):
    cache_service._scope(cache_pb2.PurgeRequest(model="m" * size))


def check_config(text):
    from services.inference.repository import config

    config.parse(text, "config.pbtxt", "m")


def check_warmup(elements):
    check_config(
        'model_warmup [{ name: "w" batch_size: 1 inputs { key: "x" value: '
        f"{{ data_type: TYPE_FP32 dims: [{elements}] zero_data: true }} }} }}]"
    )


def check_labels(folder, size):
    (folder / "labels").write_bytes(bytes(size))
    repository._labels(folder, "labels")


def check_batch(**fields):
    data = ledger_pb2.Batch(format=1, **fields).SerializeToString()
    made = ledger_pb2.AppendRequest(router_id="r", start_epoch=1, sequence=1, batch=data)
    made.digest = blake3(data).digest(16)
    return batch.read(made)


def check_records(count):
    dimensions = [ledger_pb2.Dimension(status="OK")]
    read = check_batch(dimensions=dimensions, at_ms=[AT_MS] * count, dimension=[0] * count, requests=[1] * count)
    assert read.records == count


def ask_ledger(name, **fields):
    kind = {"_report": ledger_pb2.ReportRequest, "_advise": ledger_pb2.AdviseRequest}[name]
    return asyncio.run(getattr(LEDGER, name)(kind(**fields), None))


def check_shared_bytes(size):
    made = request()
    for name in ("a", "b"):
        region = made.inputs.add(name=name).parameters
        region["shared_memory_region"].string_param = "region"
        region["shared_memory_byte_size"].int64_param = size - 8 if name == "a" else 8
    codec_request._check_shared_bytes(made.inputs)


# By row: the limit as it is documented, what it is in the code, and what is done with a number at and beyond it.
LIMITS = {
    "metadata of a request: names, values, and 32 bytes for each": (
        "16 KiB",
        rpc.MAX_METADATA_BYTES,
        lambda size: rpc.check_metadata([("x", "y" * (size - 33))]),
    ),
    "`ringmesh-tenant`, and tenants elsewhere": (
        "256 characters",
        protocol.MAX_TENANT,
        lambda size: protocol.check_tenant("t" * size, "tenant"),
    ),
    "`cache-control`": (
        "256 bytes",
        cache_control._MAX_BYTES,
        lambda size: cache_control.parse_cache_control("x" * size),
    ),
    "inputs, outputs, parameters and `raw_input_contents` together": (
        "16,384",
        request_limits.MAX_FIELDS,
        lambda count: request_limits.check_request(b"\x3a\0" * count),
    ),
    "items of a list in other requests": (
        "16,384",
        request_limits.MAX_FIELDS,
        lambda count: request_limits.check_list(b"\x0a\0" * count),
    ),
    "names, shapes and parameters": (
        "256 KiB",
        request_limits.MAX_HEAD_BYTES,
        lambda size: request_limits.check_request(wire.field(1, b"m" * (size - 4))),
    ),
    "parameters of the request, and of each tensor": (
        "64",
        request_check.MAX_PARAMETERS,
        lambda count: check(with_parameters(count)),
    ),
    "strings (BYTES elements), raw or typed": (
        "131,072",
        request_limits.MAX_STRINGS,
        lambda count: check(with_shape(count)),
    ),
    "integers and booleans in typed `contents`": (
        "524,288",
        request_limits.MAX_INTEGERS,
        lambda count: request_limits.check_request(wire.field(5, wire.field(5, wire.field(2, b"\1" * count)))),
    ),
    "typed `contents`": (
        "16 MiB",
        request_limits.MAX_TYPED_BYTES,
        lambda size: request_limits.check_request(wire.field(5, wire.field(5, wire.field(6, bytes(size - 9))))),
    ),
    "elements of a tensor, by its shape": ("1,099,511,627,776", request_check._MAX_ELEMENTS, check_elements),
    "the same of an empty tensor, without its zeros": ("67,108,864", request_check._MAX_EMPTY, check_empty),
    "requests of methods without tensor data": (
        "2 MiB",
        request_limits.MAX_PLAIN_BYTES,
        lambda size: request_limits.check_size(bytes(size)),
    ),
    "keys of the cache service": (
        "1,024 bytes",
        cache_service._MAX_KEY_BYTES,
        lambda size: cache_service._check_key(b"k" * size, "key"),
    ),
    "keys in one request of the cache service": (
        "1,000",
        cache_service._MAX_KEYS,
        lambda count: cache_service._check_count(range(count)),
    ),
    "namespaces of the cache service": (
        "256 characters",
        cache_service._MAX_NAME,
        lambda size: cache_service._check_names("n" * size, ""),
    ),
    "names of models in a purge": ("256 characters", cache_service._MAX_NAME, check_purge),
    "instances of a model": (
        "1,024",
        config_rules.MAX_INSTANCES,
        lambda count: check_config(f"instance_group [{{ count: {count - 1} }}, {{ count: 1 }}]"),
    ),
    "elements of an input of a warm-up": ("268,435,456", config_rules.MAX_WARMUP_ELEMENTS, check_warmup),
    "records of usage in a batch": ("50,000", batch.MOST_RECORDS, check_records),
    "dimensions of usage in a batch": (
        "50,000",
        BATCH["dimensions"],
        lambda count: check_batch(dimensions=[ledger_pb2.Dimension(status="OK")] * count),
    ),
    "minutes of workers in a batch of usage": (
        "10,000",
        BATCH["worker_times"],
        lambda count: check_batch(worker_times=[ledger_pb2.WorkerTime(worker_id="w", minute=29_400_000)] * count),
    ),
    "samples of keys in a batch of usage": (
        "20,000",
        BATCH["key_samples"],
        lambda count: check_batch(key_samples=[ledger_pb2.KeySample(below=1, requests=1, at_ms=AT_MS)] * count),
    ),
    "names in usage": ("256 characters", batch._LONGEST_NAME, lambda size: batch.check_name("n" * size, "name")),
    "rows of a report": (
        "10,000",
        ledger_service._MOST_ROWS,
        lambda count: ask_ledger("_report", limit=count, until_ms=DAY_MS),
    ),
    "days of a report": (
        "1,100",
        time_range._MOST_DAYS,
        lambda days: ask_ledger("_report", from_ms=DAY_MS, until_ms=(days + 1) * DAY_MS),
    ),
    "hours of advice": (
        "48",
        advice._MOST_HOURS,
        lambda hours: ask_ledger("_advise", from_ms=HOUR_MS, until_ms=(hours + 1) * HOUR_MS),
    ),
    "bytes of a request in shared memory": ("1 GiB", shared_memory.MAX_REQUEST_BYTES, check_shared_bytes),
    # Tested elsewhere: on connections, or with files.
    "concurrent calls on a connection": ("1,024", server.MAX_STREAMS, None),
    "regions of shared memory": ("1,024", shared_memory.MAX_REGIONS, None),
    "a file of labels": ("16 MiB", repository._MAX_LABEL_BYTES, None),
    "a form of the console": ("2 MiB", form._MAX_BYTES, None),
    "fields of a form of the console": ("200", form._MAX_FIELDS, None),
    "connections to `/metrics`": ("32", exposition._MAX_CONNECTIONS, None),
}
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
TESTED = {name: limit for name, limit in LIMITS.items() if limit[2] is not None}


def number(text):
    digits, _, unit = text.replace(",", "").partition(" ")
    return int(digits) * UNITS.get(unit, 1)


def documented():
    section = DOCUMENT.read_text().partition("\n## Limits\n")[2].partition("\n## ")[0]
    return {row[0]: row[1] for row in re.findall(r"^\| (.+?) \| (.+?) \| .+ \|$", section, re.M)}


def test_each_limit_is_documented_as_it_is():
    table = documented()
    for name, (text, value, _) in LIMITS.items():
        assert table.get(name) == text, name
        assert number(text) == value, name


@pytest.mark.parametrize("name", TESTED)
def test_at_the_limit_it_passes_and_beyond_it_is_refused_with_the_number(name):
    _, limit, use = LIMITS[name]
    use(limit)
    with pytest.raises(REFUSED) as refused:
        use(limit + 1)
    assert re.search(rf"\b{limit}\b", str(refused.value)), str(refused.value)


@pytest.mark.parametrize(("extra", "fits"), [(0, True), (1, False)])
def test_a_file_of_labels_is_bounded(tmp_path, monkeypatch, extra, fits):
    monkeypatch.setattr(repository, "_MAX_LABEL_BYTES", 1000)
    if fits:
        check_labels(tmp_path, 1000 + extra)
    else:
        with pytest.raises(ConfigError, match="more than 1000 bytes"):
            check_labels(tmp_path, 1000 + extra)


def read_form(body):
    async def receive():
        return {"type": "http.request", "body": body}

    return asyncio.run(form.read(Request({"type": "http", "method": "POST", "headers": []}, receive)))


def test_a_form_of_the_console_is_bounded():
    assert len(read_form(b"x=" + b"y" * (form._MAX_BYTES - 2))["x"]) == form._MAX_BYTES - 2
    with pytest.raises(HTTPException, match="up to 2 MiB"):
        read_form(b"x=" + b"y" * (form._MAX_BYTES - 1))
    assert len(read_form("&".join(f"{number}=" for number in range(200)).encode())) == 200
    with pytest.raises(HTTPException, match="must be a URL-encoded form"):
        read_form("&".join(f"{number}=" for number in range(201)).encode())


async def test_metrics_are_served_on_32_connections_at_once(monkeypatch):
    monkeypatch.setattr(exposition, "_SECONDS", 600.0)  # those that say nothing are kept, however slow the machine is
    exposed = exposition.MetricsServer("127.0.0.1:0", Metrics())
    port = await exposed.start()
    idle = []

    async def answer():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        try:
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    for connections, is_answered in ((31, True), (32, False)):
        while len(idle) < connections:
            idle.append((await asyncio.open_connection("127.0.0.1", port))[1])
        while exposed._connections != connections:
            await asyncio.sleep(0)
        assert (b"200 OK" in await answer()) == is_answered
    for writer in idle:
        writer.close()
    exposed.close()


def test_what_is_beyond_the_limits_of_w3c_is_left_out():
    assert w3c.usable_state("s" * 512)
    assert not w3c.usable_state("s" * 513)
    assert len(w3c.parse_baggage(",".join(f"k{number}=v" for number in range(65)))) == 64
    assert w3c.parse_baggage("k=" + "v" * 8190)
    assert not w3c.parse_baggage("k=" + "v" * 8191)


@pytest.mark.parametrize("field", ["ttl_ms", "lease_ms", "wait_ms"])
def test_times_of_the_cache_service_are_bounded(field):
    most = {"ttl_ms": 30 * 86400 * 1000, "lease_ms": 600_000, "wait_ms": 60_000}[field]
    assert most == {
        "ttl_ms": cache_service._MAX_TTL_MS,
        "lease_ms": cache_service._MAX_LEASE_MS,
        "wait_ms": cache_service._MAX_WAIT_MS,
    }[field]  # fmt: skip
    cache_service._check_most(field, most, most)
    with pytest.raises(InvalidArgumentError, match=f"{field} is {most + 1}; at most {most}"):
        cache_service._check_most(field, most + 1, most)
