import pytest

from services.inference.repository.config import (
    NOTHING,
    ConfigError,
    batching,
    ignored_fields,
    limits_queue,
    parse,
    read,
)


def test_what_is_set_and_not_acted_on_is_listed_by_path():
    config = parse(
        """
        name: "m"
        dynamic_batching { max_queue_delay_microseconds: 5 preserve_ordering: true }
        metric_tags { key: "k" value: "v" }
        parameters { key: "ringmesh_tenant_scope" value { string_value: "true" } }
        parameters { key: "theirs" value { string_value: "v" } }
        """,
        "config.pbtxt",
        "m",
    )
    assert ignored_fields(config) == ["metric_tags", "parameters.theirs"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_batch_sise: 8", ["max_batch_sise", "1:1"]),
        ("max_batch_size: eight", ["eight"]),
        ('name: "other"', ["'other'", "'m'"]),
        ('platform: "tensorflow_savedmodel"', ["tensorflow_savedmodel", "onnxruntime_onnx"]),
        ('backend: "python"', ["python", "onnxruntime"]),
        ('platform: "ensemble"', ["ensemble_scheduling", "together"]),
        ("ensemble_scheduling { }", ["ensemble_scheduling", "together"]),
        ("max_batch_size: -1", ["-1"]),
        ("model_transaction_policy { decoupled: true }", ["decoupled"]),
        ("dynamic_batching { priority_levels: 2 }", ["default_priority_level is 0", "1 to priority_levels, 2"]),
        ("dynamic_batching { default_priority_level: 1 }", ["default_priority_level is 1", "needs priority_levels"]),
        (
            "dynamic_batching { priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 3 } }",
            ["[3]", "1 to 2"],
        ),
        (
            'parameters { key: "ringmesh_tenant_scope" value { string_value: "yes" } }',
            ["ringmesh_tenant_scope", "'yes'", '"true" or "false"'],
        ),
        (
            'parameters { key: "ringmesh_semantic_threshold" value { string_value: "1.5" } }',
            ["ringmesh_semantic_threshold", "'1.5'", "1 at most"],
        ),
        (
            'parameters { key: "ringmesh_semantic_threshold" value { string_value: "high" } }',
            ["'high'", "a number above 0"],
        ),
        (
            'parameters { key: "ringmesh_cache_ttl_seconds" value { string_value: "nan" } }',
            ["ringmesh_cache_ttl_seconds", "'nan'", "seconds above 0"],
        ),
        (
            'parameters { key: "ringmesh_cache_stale_seconds" value { string_value: "5" } }',
            ["ringmesh_cache_stale_seconds", "needs ringmesh_cache_ttl_seconds"],
        ),
        (
            'parameters { key: "ringmesh_semantic_embedding" value { string_value: "e" } }',
            ["ringmesh_semantic_embedding", "'e'", "beside ringmesh_semantic_threshold"],
        ),
        ('input { name: "x" allow_ragged_batch: true }', ["x", "ragged"]),
    ],
)
def test_a_mistake_is_named_with_the_file(tmp_path, text, words):
    path = tmp_path / "config.pbtxt"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(path, "m")
    assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)


def test_no_file_is_no_configuration(tmp_path):
    assert read(tmp_path / "config.pbtxt", "m") is NOTHING


@pytest.mark.parametrize(
    ("policy", "limited"),
    [
        ("", False),
        ("default_timeout_microseconds: 5", True),
        ("default_timeout_microseconds: 5 timeout_action: DELAY", False),
        ("allow_timeout_override: true", True),
        ("max_queue_size: 5 timeout_action: DELAY", True),
    ],
)
@pytest.mark.parametrize(
    "field",
    [
        "default_queue_policy {{ {} }}",
        "priority_levels: 2 default_priority_level: 1 priority_queue_policy {{ key: 2 value {{ {} }} }}",
    ],
)
def test_a_queue_is_limited_where_a_request_may_fail_while_others_run(field, policy, limited):
    config = parse(f"dynamic_batching {{ {field.format(policy)} }}", "config.pbtxt", "m")
    assert limits_queue(batching(config)) is limited
