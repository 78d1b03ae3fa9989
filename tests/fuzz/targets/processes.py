"""Values and messages of other processes: cache entries, announcements, descriptions, answers, usage."""

from blake3 import blake3
from google.protobuf.message import DecodeError
from ringmesh.inference.v1 import inference_pb2
from ringmesh.ledger.v1 import ledger_pb2

from cache.keys.epochs import Epochs
from cache.tiers.entry import Entry, EntryFrames, is_answer
from router.accounting.budgets import Budgets
from router.balancing.catalog import Catalog
from router.membership.discovery import _address, _listing
from router.membership.worker_description import InvalidDescriptionError, check_description, is_text
from services.ledger.ingest import batch
from services.runtime import large_result
from services.runtime.errors import NotFoundError, RingmeshError, UnavailableError
from services.runtime.redis.redis_url import parse_redis_url
from services.runtime.rpc.server import StartError
from tests.fuzz.target import joined, parts, target
from tests.fuzz.targets.callers import deterministic, parsed

_FRAMES = EntryFrames("secret")
_KEY = b"k" * 32
_PLAIN = _FRAMES.pack(_KEY, Entry(b"value", 5, 7))
_COMPRESSED = _FRAMES.pack(_KEY, Entry(b"abcd" * 300, 5, 7))


@target("entry", [_PLAIN, _COMPRESSED, _COMPRESSED[29:]])
def entry(data):
    """What was not written with the secret is a miss; what was, is read as it was."""
    assert _FRAMES.unpack(_KEY, data) is None or data in (_PLAIN, _COMPRESSED)
    written = Entry(data * 40, len(data), 7)
    read = _FRAMES.unpack(_KEY, _FRAMES.pack(_KEY, written))
    assert read is not None
    assert (read.value, read.compute_us, read.created_at_ms) == (written.value, written.compute_us, 7)
    # A value that a holder of the secret compressed wrongly.
    kind, compute_us, created = 4, 1, 2
    mac = _FRAMES._mac(_KEY, kind, compute_us, created, data)
    forged = _FRAMES.unpack(_KEY, b"\4" + compute_us.to_bytes(4, "little") + created.to_bytes(8, "little") + mac + data)
    assert forged is None or len(forged.value) <= 4 << 20
    is_answer(data)


_ANNOUNCED = inference_pb2.Announcement(address="a:1", worker_id="w", weight=1.0, accepting=True)


@target("announcement", [joined(b"a:1", _ANNOUNCED.SerializeToString()), joined("ä:٣".encode(), b"")])
def announcement(data):
    """An announcement is of its address, with text that may be shown and a weight."""
    member, value, *_ = [*parts(data), b"", b""]
    address = _address(member)
    if address:
        assert int(address.rpartition(":")[2]) < 1 << 16
        listing = _listing(address, value)
        assert listing is None or (is_text(listing.worker_id) and 0 < listing.weight <= 1e9)


_MODEL = inference_pb2.ModelVersion(name="m", version="1", digest=bytes(16), cacheable=True)
_ENSEMBLE = inference_pb2.ModelVersion(name="e", version="1")
_STEP = _ENSEMBLE.ensemble.config.ensemble_scheduling.step.add(model_name="m", model_version=-1)
_STEP.input_map["x"] = "x"
_STEP.output_map["y"] = "y"
_DESCRIBED = inference_pb2.DescribeResponse(worker_id="w", weight=1.0, models=[_MODEL, _ENSEMBLE])


@target("description", [_DESCRIBED.SerializeToString()], InvalidDescriptionError, DecodeError)
def description(data):
    """What is found valid makes a catalog in which each model is found."""
    described = inference_pb2.DescribeResponse.FromString(data)
    check_description(described, described.models)
    catalog = Catalog([described.models])
    for model in described.models:
        try:
            catalog.find(model.name, model.version)
        except (NotFoundError, UnavailableError):
            assert model.HasField("ensemble")


_RESULT = inference_pb2.WorkResult(response=b"response", model_digest=b"d")
_EXECUTED = inference_pb2.ExecuteResponse(results=[_RESULT, _RESULT], load=inference_pb2.LoadReport(requests=3))


@target("large-answer", [_EXECUTED.SerializeToString()], ValueError)
def large_answer(data):
    """Split in any pieces, an answer is what protobuf parses."""
    whole = large_result.take_apart([data])
    pieces = [data[start : start + 3] for start in range(0, len(data), 3)]
    assert large_result.take_apart(pieces) == whole
    message = parsed(inference_pb2.ExecuteResponse, data)
    if message is None:
        return
    rest = inference_pb2.ExecuteResponse.FromString(whole.message)
    assert [result.response for result in message.results] == whole.responses
    for result in message.results:
        result.ClearField("response")
    for result in rest.results:
        assert not result.response
    assert list(map(deterministic, rest.results)) == list(map(deterministic, message.results))


@target("epochs", [joined(b"all", b"5", b"model:m", b"7", b"key:" + b"61" * 48, b"9"), joined(b"key:zz", b"1")])
def epochs(data):
    """Scopes that Redis has, of which anybody with access may have written some."""
    texts = parts(data)
    found = Epochs({})
    for scope, epoch in zip(texts[::2], texts[1::2], strict=False):
        if epoch.isdigit():
            found = found.merged({scope.decode(errors="replace"): int(epoch[:15])})
    assert len(found.key(b"d" * 16, "m", b"r" * 16)) == 32


_DIMENSION = {"tenant": "t", "model": "m", "version": "1", "status": "OK", "outcome": "miss"}
_BATCH = ledger_pb2.Batch(format=1, at_ms=[1_764_000_000_000], dimension=[0], requests=[1], total_us=[5])
_BATCH.dimensions.add(**_DIMENSION)
_BATCH.worker_times.add(worker_id="w", worker_type="cpu", minute=29_400_000, seconds=7)


@target("usage-batch", [_BATCH.SerializeToString()], RingmeshError)
def usage_batch(data):
    """As the ledger takes it from a router, and as PostgreSQL stores it."""
    request = ledger_pb2.AppendRequest(router_id="r", start_epoch=1, sequence=1, batch=data)
    request.digest = blake3(data).digest(16)
    read = batch.read(request)
    assert all(len(column) == read.records for column in (read.dimension, *read.columns.values()))
    assert all("\0" not in text for series in read.series for text in series)


_LEASES = ledger_pb2.LeaseResponse()
_LEASES.leases.add(amount_nano=5).budget.tenant = "acme"


@target("leases", [_LEASES.SerializeToString()], DecodeError)
def leases(data):
    budgets = Budgets(lambda: 1.0)
    budgets.renewed(ledger_pb2.LeaseResponse.FromString(data), [])
    budgets.charge("acme", "m", "cpu", 5, 5)


@target(
    "redis-url",
    [b"redis://u:p@h:1/0?db=1", b"redis+sentinel://a,b:2/s/1?sentinel_username=x", b"unix:///s"],
    StartError,
)
def redis_url(data):
    """No message has the password."""
    text = data.decode("latin-1")
    parse_redis_url(text, "RINGMESH_REDIS_URL")
