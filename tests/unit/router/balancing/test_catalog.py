import pytest
from google.protobuf import text_format
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import model_config_pb2

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


def test_an_ensemble_of_which_a_step_is_an_ensemble_has_no_plan_that_leads_back_to_it():
    text = """
        input { name: "a" } output { name: "c" }
        ensemble_scheduling {
          step { model_name: "e" input_map { key: "x" value: "a" } output_map { key: "y" value: "b" } }
          step { model_name: "missing" input_map { key: "x" value: "b" } output_map { key: "y" value: "c" } }
        }
    """
    ensemble = inference_pb2.Ensemble(config=text_format.Parse(text, model_config_pb2.ModelConfig()))
    assert Catalog([[version("e", ensemble=ensemble)]]).find("e", "").plan is None


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


def test_a_message_is_clipped_between_two_characters():
    said = InvalidArgumentError("é" * 900).message
    assert said == "é" * 500 + "…"
