"""Files: configurations, models, labels, spooled usage, API keys."""

import hashlib
import shutil
import tempfile
from pathlib import Path

from router.accounting.ledger_spool import LedgerSpool, SpoolError
from services.inference.execution import graph, inline_runs
from services.inference.execution.batch_proof.prover import prove
from services.inference.models import decisions
from services.inference.repository import batching_policy, config, config_rules
from services.inference.repository.repository import _labels
from services.runtime.oip import ensemble
from services.runtime.rpc.api_keys import ApiKeys, KeyFileError
from tests import models
from tests.fuzz.target import joined, parts, target

# In memory, where there is such a folder: some targets write files for each input.
_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
_HELD = tempfile.TemporaryDirectory(prefix="ringmesh-fuzz-files-", dir=_MEMORY)
_FOLDER = Path(_HELD.name)

_CONFIG = b"""
name: "m" platform: "onnxruntime_onnx" max_batch_size: 8
input [{ name: "x" data_type: TYPE_FP32 dims: [-1, 2] reshape: { shape: [2] } }]
output [{ name: "y" data_type: TYPE_FP32 dims: [2] label_filename: "labels.txt" }]
dynamic_batching { preferred_batch_size: [4] priority_levels: 2 default_priority_level: 1 }
instance_group [{ count: 2 kind: KIND_CPU }]
version_policy { latest { num_versions: 2 } }
parameters { key: "ringmesh_cache_ttl_seconds" value: { string_value: "60" } }
"""
_ENSEMBLE = b"""
platform: "ensemble"
input [{ name: "a" data_type: TYPE_FP32 dims: [1] }]
output [{ name: "b" data_type: TYPE_FP32 dims: [1] }]
ensemble_scheduling {
  step [{ model_name: "m" model_version: -1 input_map { key: "x" value: "a" } output_map { key: "y" value: "b" } }]
}
"""
_WARMUP = b"""
sequence_batching {
  max_sequence_idle_microseconds: 5
  control_input [{ name: "s" control [{ kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] }] }]
  state [{ input_name: "i" output_name: "o" data_type: TYPE_FP32 dims: [1] }]
}
model_warmup [{ name: "w" batch_size: 1 inputs { key: "x" value: { data_type: TYPE_FP32 dims: [2] zero_data: true } } }]
"""


@target(
    "config",
    [
        _CONFIG, _ENSEMBLE, _WARMUP, b"input {" * 300, b'{"input":' * 300,
        b'{"name":"m","maxBatchSize":8,"input":[{"name":"x","dataType":"TYPE_FP32","dims":["2"]}]}',
    ],
    config.ConfigError, ensemble.EnsembleError,
)  # fmt: skip
def configuration(data):
    """What is found valid can be served: none of its rules raises anything."""
    found = config.parse(data.decode("utf-8", "replace"), "config.pbtxt", "m")
    config.ignored_fields(found)
    for semantic in (False, True):
        config.serving_rules(found, semantic=semantic)
    config.wanted_versions(found, range(1, 4))
    batching_policy.policy(found)
    config.limits_queue(config.batching(found))
    config_rules.instances(found)
    if found.platform == "ensemble":
        ensemble.plan(found.ensemble_scheduling, [t.name for t in found.input], [t.name for t in found.output])


def _onnx():
    for make in (models.mlp, models.words, models.accumulator, models.turned, models.scaled):
        yield next(make(_FOLDER / "onnx").rglob("*.onnx"), None) or next((_FOLDER / "onnx").rglob("*.onnx"))


_SEEDS = [file.read_bytes() for file in _onnx()]
# An operator whose name is not UTF-8, beside an unknown one.
_NAMELESS = b"\x3a\x0d" + b"\x0a\x04\x22\x02\xff\xfe" + b"\x0a\x05\x22\x03Foo"


@target("onnx", [*(seed for seed in _SEEDS if len(seed) < 4096), _NAMELESS], ValueError)
def onnx_model(data):
    """A file that protobuf parses is judged, whatever it says."""
    file = _FOLDER / "model.onnx"
    file.write_bytes(data or b"\0")
    model = graph.read(file)
    graph.operator_types(model)
    graph.random_operators(model)
    graph.unranked(model)
    try:
        str(prove(model).reason)
        str(inline_runs.verdict(model).reason)
    except ValueError as error:
        raise AssertionError("a verdict, not an error") from error


@target("labels", ["cat\ndog\r\n\N{BYTE ORDER MARK}x\n".encode(), b"\xff\x0b\x0c\x85\n\n"], config.ConfigError)
def labels(data):
    (_FOLDER / "labels.txt").write_bytes(data)
    found = _labels(_FOLDER, "labels.txt")
    assert all(b"\n" not in label for label in found)
    assert len(found) <= len(data)


@target("label-name", [b"labels.txt", b"../labels.txt", b"/etc/passwd", b"a\0b"], config.ConfigError)
def label_name(data):
    """No name leads out of the folder of the model."""
    assert _labels(_FOLDER, data.decode("utf-8", "surrogateescape")) == _labels(_FOLDER, "labels.txt")


_LINE = f'{{"id":"a","sha256":"{hashlib.sha256(b"k").hexdigest()}","tenant":"t","roles":["infer"],"models":["m"]}}'


@target(
    "api-keys",
    [_LINE.encode(), _LINE.replace("}", ',"expires":"2027-01-01T00:00:00Z"}').encode(), b"\xff", b"[" * 500, b"{}\n\n"],
    KeyFileError,
)
def api_keys(data):
    """No key of a tenant is an operator's."""
    file = _FOLDER / "keys"
    file.write_bytes(data)
    for identity in ApiKeys(file)._entries.values():
        assert not (identity.tenant and identity.roles & {"operate", "admin"})


@target(
    "spool",
    [
        joined(b"epoch", b"5", b"router-id", b"abc", b"leases", b"", b"5-1-1-1.batch", b"damaged"),
        joined(b"epoch", b"9" * 30, b"5-1-2-3.batch", b"", b"5-1-0-0.batch", bytes(16)),
        joined(b"epoch", b"\xff", b"router-id", b"\xff", "٣-٣-٣-٣.batch".encode(), b"x"),
    ],
    SpoolError,
)
def spool(data):
    """Whatever an earlier life left, the next one sends what is whole and counts what is not."""
    folder = _FOLDER / "spool"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    texts = parts(data)[:40]
    for name, content in zip(texts[::2], texts[1::2], strict=False):
        if name and b"/" not in name and b"\0" not in name and name not in (b".", b"..", b"lock"):
            Path(folder, name.decode("utf-8", "surrogateescape")).write_bytes(content)
    made = LedgerSpool(folder, 1 << 20, lambda: 7)
    made.open()
    try:
        made.append(b"batch", 1, 1)
        assert made.dropped_requests == 0
        assert 0 < made.epoch < 1 << 63
        assert made.router_id
        for _ in range(len(made)):
            one = made.first()
            assert one is not None
            made.read(one)
            made.written(made.first())
        assert len(made) == 0
    finally:
        made.close()


_KEPT = decisions.Decisions(_FOLDER / "decisions", 1 << 20)
_KEPT.keep("m", decisions.Decision(True, 5, decisions.Overrides("", {"1/model.onnx": b"x"}), False))
_KEPT.close()
_KEPT_FILE = next(path for path in (_FOLDER / "decisions").iterdir() if path.name != "lock")


@target("decision", [_KEPT_FILE.read_bytes()])
def decision(data):
    """A damaged file is none, and no file is one of another model. The fuzzer learns to write whole files."""
    file = _FOLDER / _KEPT_FILE.name
    file.write_bytes(data)
    found = decisions._read(file)
    assert found is None or found[0] == "m"
