"""What no configuration may say: each field that is acted on has a range, and beyond it a message that tells it."""

import pytest
from ringmesh.oip.v2.model_config_pb2 import ModelConfig

from services.inference.repository import config
from services.inference.repository.config import ConfigError, parse
from services.inference.repository.config_rules import MAX_INSTANCES, MAX_MICROSECONDS, RANGES, SIZES

# Fields below one that is acted on, which nothing here reads.
NOT_READ = (
    "sequence_batching.control_input.control.int32_false_true",
    "sequence_batching.control_input.control.fp32_false_true",
)
# What has to stand beside a field for it to be read.
BESIDE = {
    "dynamic_batching.preferred_batch_size": "max_batch_size: 2147483647",
    "sequence_batching.oldest.preferred_batch_size": "max_batch_size: 2147483647",
    "dynamic_batching.priority_levels": "dynamic_batching { default_priority_level: 1 }",
    "dynamic_batching.default_priority_level": "dynamic_batching { priority_levels: 1024 }",
    "model_warmup.batch_size": "max_batch_size: 2147483647",
    "ensemble_scheduling.step.model_version": 'platform: "ensemble"',
}


def numbers(descriptor, prefix=""):
    """The paths of all numbers that may be set and are acted on."""
    for field in descriptor.fields:
        path = prefix + field.name
        if path not in config._NESTED and not acted_on(path):
            continue
        message = field.message_type
        if message is not None and message.GetOptions().map_entry:
            message = message.fields_by_name["value"].message_type
            if message is None:
                continue
        if message is not None:
            yield from numbers(message, path + ".")
        elif field.enum_type is None and field.cpp_type not in (field.CPPTYPE_STRING, field.CPPTYPE_BOOL):
            yield path


def acted_on(path):
    """Whether the field, or one that it is part of, is."""
    names = path.split(".")
    return any(".".join(names[:end]) in config._ACTED_ON for end in range(1, len(names) + 1))


def text_of(path, value):
    """A configuration with this field."""
    text = f"{path.rpartition('.')[2]}: {value}"
    for name in reversed(path.split(".")[:-1]):
        if name == "priority_queue_policy":
            text = f"{name} {{ key: 1 value {{ {text} }} }} priority_levels: 1 default_priority_level: 1"
        elif name == "inputs":
            text = f'{name} {{ key: "x" value {{ {text} }} }}'
        elif name == "step":
            maps = 'input_map { key: "a" value: "b" } output_map { key: "a" value: "c" }'
            text = f'{name} {{ model_name: "s" {maps} {text} }}'
        else:
            text = f"{name} {{ {text} }}"
    beside = BESIDE.get(path, "")
    if beside.startswith("dynamic_batching"):
        text = text[:-1] + beside.removeprefix("dynamic_batching {")
        beside = ""
    return f"{beside} {text}"


def test_every_number_that_is_acted_on_has_a_range():
    found = set(numbers(ModelConfig.DESCRIPTOR))
    assert {path for path in found if not path.startswith(NOT_READ)} == {*RANGES, *SIZES}


@pytest.mark.parametrize("path", RANGES)
def test_a_number_beyond_its_range_is_refused_by_name_and_those_at_its_ends_are_taken(path):
    low, high = RANGES[path]
    for value in (low - 1, high + 1):
        with pytest.raises(ConfigError, match=path.split(".")[-1]) as caught:
            parse(text_of(path, value), "config.pbtxt", "m")
        assert str(value) in str(caught.value)
    for value in (low, high):
        if (path, value) != ("dynamic_batching.default_priority_level", 0):  # without levels it is left out
            levels = ("dynamic_batching.priority_levels", 0)
            text = text_of(path, value) if (path, value) != levels else "dynamic_batching { priority_levels: 0 }"
            parse(text, "config.pbtxt", "m")


@pytest.mark.parametrize("path", sorted(SIZES))
def test_a_size_is_1_or_more_or_free(path):
    for value in (0, -2):
        with pytest.raises(ConfigError, match=rf"{path} has {value}; a size is 1 or more"):
            parse(text_of(path, value), "config.pbtxt", "m")
    for value in (1, -1, 2**40):
        parse(text_of(path, value), "config.pbtxt", "m")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "max_batch_size: 4 dynamic_batching { preferred_batch_size: [2, 8] }",
            ["8", "1 to max_batch_size, which is 4"],
        ),
        ("dynamic_batching { preferred_batch_size: 8 }", ["8", "max_batch_size, which is not set"]),
        ("max_batch_size: 0 dynamic_batching { preferred_batch_size: 8 }", ["8", "max_batch_size, which is 0"]),
        ('{"maxBatchSize": 4, "dynamicBatching": {"preferredBatchSize": [8]}}', ["8", "max_batch_size, which is 4"]),
        (
            "max_batch_size: 4 sequence_batching { oldest { preferred_batch_size: 8 } }",
            ["sequence_batching.oldest", "8", "which is 4"],
        ),
        ("instance_group { count: -1 }", ["instance_group.count is -1", f"0 to {MAX_INSTANCES}"]),
        ("instance_group { count: 2147483647 }", ["2147483647", f"0 to {MAX_INSTANCES}"]),
        (
            "instance_group [{ count: 600 }, { count: 300 gpus: [0, 1] kind: KIND_GPU }]",
            ["1200 instances", f"{MAX_INSTANCES} at most"],
        ),
        ("instance_group { kind: KIND_CPU gpus: 0 }", ["gpus", "KIND_CPU"]),
        ("instance_group { kind: KIND_MODEL gpus: 0 }", ["gpus", "KIND_MODEL"]),
        ('instance_group { profile: "1" }', ["profile", "TensorRT"]),
        ("instance_group { kind: 9 }", ["instance_group.kind is 9", "KIND_CPU"]),
        ('input { name: "x" data_type: 99 }', ["input.data_type is 99", "TYPE_FP32"]),
        ('{"input": [{"name": "x", "dataType": 99}]}', ["input.data_type is 99", "TYPE_FP32"]),
        ('input { name: "x" data_type: TYPE_FP8 }', ["TYPE_FP8"]),
        ('input { name: "x" } input { name: "x" }', ["input 'x'", "2 times"]),
        ('output { name: "y" is_shape_tensor: true }', ["'y'", "is_shape_tensor"]),
        ('input { name: "x" is_non_linear_format_io: true }', ["'x'", "is_non_linear_format_io"]),
        ("dynamic_batching { max_queue_delay_microseconds: -1 }", ["-1"]),
        (
            f"dynamic_batching {{ max_queue_delay_microseconds: {2**64 - 1} }}",
            ["max_queue_delay_microseconds", str(MAX_MICROSECONDS)],
        ),
        ("dynamic_batching { default_queue_policy { timeout_action: 7 } }", ["timeout_action is 7", "REJECT, DELAY"]),
        (
            "dynamic_batching { preserve_ordering: true priority_levels: 2 default_priority_level: 1 }",
            ["preserve_ordering", "2"],
        ),
        (
            "dynamic_batching { preserve_ordering: true "
            "default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1 } }",
            ["preserve_ordering", "DELAY"],
        ),
        ("sequence_batching { } response_cache { enable: true }", ["response_cache", "sequence_batching"]),
        ("sequence_batching { iterative_sequence: true }", ["iterative_sequence"]),
        ("sequence_batching { direct { minimum_slot_utilization: nan } }", ["minimum_slot_utilization", "nan"]),
        ("sequence_batching { } dynamic_batching { }", ["sequence_batching", "dynamic_batching"]),
        ("max_batch_size: 2 model_warmup { batch_size: 3 }", ["batch_size 3", "max_batch_size"]),
        (
            'model_warmup { inputs { key: "x" value { dims: [100000, 100000] zero_data: true } } }',
            ["'x'", "10000000000 elements"],
        ),
        ('platform: "ensemble" ensemble_scheduling { }', ["no step"]),
        ('platform: "ensemble" ensemble_scheduling { step { model_name: "s" } }', ["step[0]", "input_map"]),
        ('platform: "ensemble" backend: "onnxruntime" ensemble_scheduling { }', ["backend", "an ensemble has none"]),
        ('platform: "ensemble" instance_group { } ensemble_scheduling { }', ["instance_group", "an ensemble has none"]),
        ('platform: "ensemble" optimization { } ensemble_scheduling { }', ["optimization", "an ensemble has none"]),
        ('platform: "ensemble" model_warmup { } ensemble_scheduling { }', ["model_warmup", "an ensemble has none"]),
        (
            'parameters { key: "ringmesh_cache_ttl_seconds" value { string_value: "1e300" } }',
            ["ringmesh_cache_ttl_seconds", "1000000000 at most"],
        ),
    ],
)
def test_a_mistake_is_refused_with_what_it_should_be(text, words):
    with pytest.raises(ConfigError) as caught:
        parse(text, "config.pbtxt", "m")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_presence_is_that_of_the_parsed_message():
    for text, present in [
        ("max_batch_size: 0", True),
        ('{"maxBatchSize": 0}', True),
        ("", False),
        ("# max_batch_size: 8", False),
        ('parameters { key: "max_batch_size" value { string_value: "max_batch_size: 8" } }', False),
        ('{"name": "max_batch_size: 8"}', False),
    ]:
        name = "max_batch_size: 8"
        assert parse(text, "config.pbtxt", name).HasField("max_batch_size") is present


@pytest.mark.parametrize(
    ("strategy", "delay"), [("direct {%s}", 0), ("direct {%s minimum_slot_utilization: 1 }", 5), ("oldest {%s}", 5)]
)
def test_sequences_wait_for_one_another_as_in_triton(strategy, delay):
    text = f"sequence_batching {{ {strategy % 'max_queue_delay_microseconds: 5'} }}"
    assert config.batching(parse(text, "config.pbtxt", "m")).max_queue_delay_microseconds == delay
