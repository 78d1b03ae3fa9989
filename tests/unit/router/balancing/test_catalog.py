import pytest
from google.protobuf import text_format
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2, model_config_pb2

from cache.policy.freshness import Freshness
from router.balancing.catalog import Catalog
from services.runtime.errors import InvalidArgumentError, NotFoundError, UnavailableError
from services.runtime.rpc.rpc import status_details


def version(name, number=1, **fields):
    return inference_pb2.ModelVersion(name=name, version=str(number), digest=name.encode(), cacheable=True, **fields)


def test_an_ensemble_is_as_fresh_as_its_shortest_lived_step():
    text = """
        input { name: "a" } output { name: "c" }
        ensemble_scheduling {
          step { model_name: "one" input_map { key: "x" value: "a" } output_map { key: "y" value: "b" } }
          step { model_name: "two" input_map { key: "x" value: "b" } output_map { key: "y" value: "c" } }
        }
    """
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    whole = inference_pb2.Ensemble(own_digest=b"w", config=config)
    steps = [version("one", ttl_ms=5000, stale_ms=100), version("two")]
    assert Catalog([steps]).find("one", "").freshness == Freshness(5000, 100)
    assert Catalog([steps]).find("two", "").freshness is None
    assert Catalog([[*steps, version("e", ensemble=whole)]]).find("e", "").freshness == Freshness(5000, 100)
    ensemble = version("e", ensemble=whole, ttl_ms=1000, stale_ms=900)
    assert Catalog([[*steps, ensemble]]).find("e", "").freshness == Freshness(1000, 100)


def pipeline(name="e", not_runnable="no model 'two'"):
    """An ensemble of `one` and `two` on a worker that cannot run it."""
    text = """
        input { name: "a" } output { name: "c" }
        ensemble_scheduling {
          step { model_name: "one" input_map { key: "x" value: "a" } output_map { key: "y" value: "b" } }
          step { model_name: "two" input_map { key: "x" value: "b" } output_map { key: "y" value: "c" } }
        }
    """
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    ensemble = inference_pb2.Ensemble(own_digest=b"w", config=config, not_runnable=not_runnable)
    return version(name, ensemble=ensemble, metadata=metadata({"a": "FP32"}, {"c": "FP32"}))


def metadata(inputs, outputs):
    tensors = [[{"name": n, "datatype": datatype} for n, datatype in each.items()] for each in (inputs, outputs)]
    return grpc_service_pb2.ModelMetadataResponse(inputs=tensors[0], outputs=tensors[1])


def step(name, inputs, outputs, **fields):
    return version(name, metadata=metadata(inputs, outputs), **fields)


def test_what_a_hit_saved_is_priced_as_the_cheapest_of_the_workers_that_hold_its_model():
    on_gpu = [version("small"), version("large", provider="CUDAExecutionProvider")]
    assert Catalog([on_gpu]).find("small", "").worker_type == "gpu"
    for holdings in ([on_gpu, [version("small")]], [[version("small")], on_gpu]):
        catalog = Catalog(holdings)
        assert (catalog.find("small", "").worker_type, catalog.find("large", "").worker_type) == ("cpu", "gpu")


X, Y = {"x": "FP32"}, {"y": "FP32"}


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([step("one", X, Y), step("two", X, Y)], ""),
        ([step("one", X, Y)], "no worker holds its step 'two'"),
        ([step("one", X, Y), pipeline("two")], "step 'two' is an ensemble; a step must be a model"),
        ([step("one", X, Y), step("two", X, {"y": "INT8"})], "output 'c' is INT8, and its config.pbtxt says FP32"),
        ([step("one", X, Y), step("two", {"x": "INT8"}, Y)], "step 'two' takes 'x' as INT8, and tensor 'b' is FP32"),
        ([step("one", X, Y), step("two", {**X, "z": "FP32"}, Y)], "step 'two' also needs input 'z'"),
        ([step("one", X, Y), step("two", {**X, "z": "FP32"}, Y, optional_inputs=["z"])], ""),
        ([step("one", X, Y), step("two", X, {"z": "FP32"})], "step 'two' has no output 'y'; it has: z"),
    ],
)
def test_an_ensemble_that_nobody_can_run_says_why_and_has_no_plan(steps, reason):
    entry = Catalog([[pipeline()], steps]).find("e", "")
    assert entry.runnable.reason == reason
    assert bool(entry.plan) != bool(reason)
    assert entry.cacheable.reason == reason


def test_an_ensemble_that_is_a_step_of_itself_has_no_plan_that_leads_back_to_it():
    itself = pipeline()
    itself.ensemble.config.ensemble_scheduling.step[0].model_name = "e"
    entry = Catalog([[itself, step("two", X, Y)]]).find("e", "")
    assert (entry.plan, entry.runnable.reason) == (None, "step 'e' is an ensemble; a step must be a model")


def test_an_ensemble_that_a_worker_runs_is_not_judged_by_what_another_says():
    assert Catalog([[pipeline()], [pipeline(not_runnable=""), version("one"), version("two")]]).find("e", "").runnable


def test_the_models_that_keep_tenants_apart_are_told():
    assert Catalog([[version("one", tenant_scoped=True), version("two")]]).tenant_scoped == ["one"]


def test_what_is_said_of_an_absent_version_fits_into_metadata_however_many_there_are():
    catalog = Catalog([[version("m" * 90, number=number) for number in range(1, 500)]])
    with pytest.raises(NotFoundError, match=r"has no version '500'; it has: 1, 2, .* and 479 more$") as caught:
        catalog.find("m" * 90, "500")
    # gRPC clients take 8 KB, percent-encoded in grpc-message and twice more in the details.
    details = sum(len(value) for _, value in status_details(caught.value))
    assert len(caught.value.message) + details * 4 / 3 < 5000


def test_a_model_that_no_worker_could_load_is_unavailable_with_the_reason():
    failed = [inference_pb2.FailedVersion(model="bad", version="2", reason="it is broken")]
    with pytest.raises(UnavailableError, match=r"^model 'bad' failed to load: it is broken$"):
        Catalog([], failed).find("bad", "")
    assert Catalog([[version("bad")]], failed).find("bad", "").version == "1"
    with pytest.raises(UnavailableError, match=r"^version 2 of model 'bad' failed to load"):
        Catalog([[version("bad")]], failed).find("bad", "2")
    assert Catalog([[version("bad", number=2)]], failed).find("bad", "2").version == "2"


def test_where_workers_hold_no_model_any_is_unknown_and_without_workers_none_can_be_served():
    with pytest.raises(NotFoundError, match="'m' is not found"):
        Catalog([[]]).find("m", "")
    with pytest.raises(UnavailableError, match="no worker is connected"):
        Catalog([]).find("m", "")


def test_a_message_is_clipped_between_two_characters():
    said = InvalidArgumentError("é" * 900).message
    assert said == "é" * 500 + "…"


def test_with_identities_tenants_share_the_answers_of_models_that_are_marked_shared_only():
    models = [version("plain"), version("scoped", tenant_scoped=True), version("shared", tenant_shared=True)]
    assert Catalog([models]).tenant_scoped == ["scoped"]
    assert Catalog([models], isolates=True).tenant_scoped == ["plain", "scoped"]
