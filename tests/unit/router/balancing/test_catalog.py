import pytest
from google.protobuf import text_format
from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import model_config_pb2

from cache.policy.freshness import Freshness
from router.balancing.catalog import Catalog
from services.runtime.errors import InvalidArgumentError, NotFoundError
from services.runtime.rpc.rpc import status_details


def version(name, **fields):
    return inference_pb2.ModelVersion(name=name, version="1", digest=name.encode(), cacheable=True, **fields)


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


def test_what_is_said_of_an_unknown_model_fits_into_metadata_however_many_there_are():
    catalog = Catalog([[version(f"{'m' * 90}-{number:03}") for number in range(500)]])
    with pytest.raises(NotFoundError, match=r"^no model 'typo' \(.*RepositoryIndex says why\); there are: m") as caught:
        catalog.find("typo", "")
    # gRPC clients take 8 KB, percent-encoded in grpc-message and twice more in the details.
    details = sum(len(value) for _, value in status_details(caught.value))
    assert len(caught.value.message) + details * 4 / 3 < 5000
    with pytest.raises(NotFoundError, match=r"m-000, .* and 480 more$"):
        Catalog([[version(f"m-{number:03}") for number in range(500)]]).find("typo", "")


def test_a_message_is_clipped_between_two_characters():
    said = InvalidArgumentError("é" * 900).message
    assert said == "é" * 500 + "…"
