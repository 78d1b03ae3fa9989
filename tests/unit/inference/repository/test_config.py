import pytest
from google.protobuf import message_factory

from services.inference.execution import execution
from services.inference.repository.config import (
    NOTHING,
    ConfigError,
    ModelConfig,
    batching,
    ignored_fields,
    limits_queue,
    parse,
    read,
)

# Of Triton's fields those that are reported, as docs/models.md lists them.
IGNORED = {
    *("runtime", "batch_input", "batch_output", "cc_model_filenames", "metric_tags", "model_repository_agents"),
    *("model_metrics", "model_operations"),
    *("input.is_shape_tensor", "input.allow_ragged_batch", "input.is_non_linear_format_io"),
    *("output.is_shape_tensor", "output.is_non_linear_format_io"),
    *("optimization.priority", "optimization.input_pinned_memory", "optimization.gather_kernel_buffer_threshold"),
    *("optimization.eager_batching", "optimization.cuda.busy_wait_events", "optimization.cuda.graph_spec"),
    "optimization.cuda.output_copy_stream",
    *("instance_group.rate_limiter", "instance_group.secondary_devices", "instance_group.profile"),
    *("instance_group.passive", "instance_group.host_policy"),
    *("sequence_batching.iterative_sequence", "sequence_batching.oldest.max_candidate_sequences"),
    "sequence_batching.state.use_same_buffer_for_input_output",
    "sequence_batching.state.use_growable_memory",
    *("ensemble_scheduling.max_inflight_requests", "ensemble_scheduling.step.model_namespace"),
}


def every_field(descriptor):
    """A message of each field of `descriptor`, and of each field of those, that is set alone."""
    for field in descriptor.fields:
        kind = field.message_type
        made = message_factory.GetMessageClass(descriptor)()
        value = getattr(made, field.name)
        if kind is None:
            number = "1" if field.type in (field.TYPE_STRING, field.TYPE_BYTES) else 1
            value.append(number) if field.is_repeated else setattr(made, field.name, number)
        elif kind.GetOptions().map_entry:
            key = "1" if kind.fields_by_name["key"].type == field.TYPE_STRING else 1
            if kind.fields_by_name["value"].message_type is not None:
                value[key].SetInParent()
            else:
                value[key] = "1"
        else:
            for inner in every_field(kind):
                whole = type(made)()
                target = getattr(whole, field.name)
                target.add().CopyFrom(inner) if field.is_repeated else target.CopyFrom(inner)
                yield whole
            value.add() if field.is_repeated else value.SetInParent()
        yield made


def test_every_field_of_triton_is_acted_on_or_reported():
    found = {path for config in every_field(ModelConfig.DESCRIPTOR) for path in ignored_fields(config)}
    assert found == IGNORED | {"parameters.1"}


def test_what_is_set_and_not_acted_on_is_listed_once_by_path():
    config = parse(
        """
        name: "m"
        dynamic_batching { max_queue_delay_microseconds: 5 preserve_ordering: true }
        instance_group { passive: true }
        instance_group { passive: true }
        metric_tags { key: "k" value: "v" }
        parameters { key: "ringmesh_tenant_scope" value { string_value: "true" } }
        parameters { key: "intra_op_thread_count" value { string_value: "1" } }
        parameters { key: "theirs" value { string_value: "v" } }
        """,
        "config.pbtxt",
        "m",
    )
    assert ignored_fields(config) == ["instance_group.passive", "metric_tags", "parameters.theirs"]


def test_every_parameter_that_execution_reads_is_known(monkeypatch):
    read = set()
    monkeypatch.setattr(execution, "_whole", lambda config, name, allowed: read.add(name))
    execution.session_options(NOTHING, 1)
    execution.executions(NOTHING, [execution.CUDA])
    config = ModelConfig()
    for name in read:
        config.parameters[name].string_value = "1"
    assert len(read) > 5
    assert ignored_fields(config) == []


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "config.pbtxt"
    path.write_text("max_batch_size: 8", encoding="utf-8-sig")
    assert read(path, "m").max_batch_size == 8
    assert parse("\N{BYTE ORDER MARK}{}", "config", "m") == NOTHING


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_batchsize: 4", 'no field named "max_batchsize"; did you mean max_batch_size?'),
        ('{"max_batchsize": 4}', "; did you mean max_batch_size?"),
        ("input { data_type: FP32 }", "has no value named FP32; did you mean TYPE_FP32?"),
        ("dynamic_batching { priority_level: 2 }", "; did you mean priority_levels?"),
        ("wholly_unknown: 4", 'no field named "wholly_unknown"'),
    ],
)
def test_an_unknown_name_is_said_in_one_line_with_the_nearest(text, said):
    with pytest.raises(ConfigError) as caught:
        parse(text, "config.pbtxt", "m")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_batch_sise: 8", ["max_batch_sise", "1:1"]),
        ("max_batch_size: eight", ["eight"]),
        ("input { data_type: 99999999999999999999 }", ["99999999999999999999"]),
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
            'parameters { key: "ringmesh_shared_tier" value { string_value: "true" } }',
            ["ringmesh_shared_tier", "'true'", "auto, always or never"],
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
        ('input { name: "x" allow_ragged_batch: true }', ["allow_ragged_batch of x"]),
        ('batch_input { target_name: "i" source_input: "x" }', ["batch_input for 'i'"]),
        ('batch_output { target_name: "o" source_input: "x" }', ["batch_output for 'o'"]),
        ('input { name: "x" format: FORMAT_NCHW dims: [8] }', ["'x'", "FORMAT_NCHW", "[8]", "three"]),
        ('model_operations { op_library_filename: "libcustom.so" }', ["op_library_filename", "libcustom.so", "custom"]),
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
