import pytest

from services.inference.execution import execution
from services.inference.execution.execution import CPU, CUDA, OPENVINO, TENSORRT
from services.inference.repository.config import ConfigError, ignored_fields, parse

GPU_BUILD = [TENSORRT, CUDA, CPU]


def config(text):
    return parse(text, "config.pbtxt", "m")


def names(chosen):
    return [name for name, _ in chosen.providers]


def one(text, available):
    (chosen,) = execution.executions(config(text), available)
    return chosen


def test_a_gpu_is_taken_where_there_is_one_with_the_cpu_behind_it():
    chosen = one("", GPU_BUILD)
    assert names(chosen) == [CUDA, CPU]
    assert (chosen.device, chosen.missing, chosen.pinned_outputs, chosen.cuda_graphs) == (0, (), True, False)
    assert chosen.providers[0][1] == {"device_id": "0"}


def test_without_a_gpu_it_is_the_cpu_and_nothing_is_missed():
    chosen = one("", [CPU])
    assert (names(chosen), chosen.device, chosen.missing) == ([CPU], None, ())


def test_a_model_for_the_gpu_runs_on_the_cpu_where_there_is_none_and_that_is_told():
    chosen = one("instance_group { kind: KIND_GPU }", [CPU])
    assert (names(chosen), chosen.missing) == ([CPU], (CUDA,))


def test_an_accelerator_of_the_gpu_is_missed_where_there_is_none():
    wanted = "optimization { execution_accelerators { gpu_execution_accelerator { name: 'tensorrt' } } }"
    assert one(wanted, [CPU]).missing == (TENSORRT,)
    assert one(f"instance_group {{ kind: KIND_GPU }} {wanted}", [CPU]).missing == (TENSORRT,)
    assert one(f"instance_group {{ kind: KIND_CPU }} {wanted}", [CPU]).missing == ()


def test_a_model_for_the_cpu_stays_there():
    assert names(one("instance_group { kind: KIND_CPU }", GPU_BUILD)) == [CPU]


def test_each_gpu_named_has_a_session():
    chosen = execution.executions(config("instance_group { gpus: [ 2, 0 ] }"), GPU_BUILD)
    assert [one.device for one in chosen] == [0, 2]
    assert [one.providers[0][1]["device_id"] for one in chosen] == ["0", "2"]


def test_tensorrt_comes_first_where_it_is_asked_for_and_present():
    text = """optimization { execution_accelerators { gpu_execution_accelerator {
        name: "tensorrt"
        parameters { key: "precision_mode" value: "FP16" }
        parameters { key: "max_workspace_size_bytes" value: "1073741824" }
        parameters { key: "trt_engine_cache_enable" value: "true" } } } }"""
    chosen = one(text, GPU_BUILD)
    assert names(chosen) == [TENSORRT, CUDA, CPU]
    assert chosen.providers[0][1] == {
        "device_id": "0",
        "trt_fp16_enable": "1",
        "trt_max_workspace_size": "1073741824",
        "trt_engine_cache_enable": "1",
    }
    chosen = one(text, [CUDA, CPU])
    assert (names(chosen), chosen.missing) == ([CUDA, CPU], (TENSORRT,))


def test_options_of_cuda_come_from_the_accelerator_and_from_tritons_parameters():
    chosen = one(
        """optimization { cuda { graphs: true } output_pinned_memory { enable: false }
            execution_accelerators { gpu_execution_accelerator {
            name: "cuda" parameters { key: "use_ep_level_unified_stream" value: "1" } } } }
        parameters { key: "cudnn_conv_algo_search" value { string_value: "1" } }
        parameters { key: "gpu_mem_limit" value { string_value: "4096" } }
        parameters { key: "arena_extend_strategy" value { string_value: "1" } }""",
        GPU_BUILD,
    )
    assert chosen.providers[0] == (
        CUDA,
        {
            "device_id": "0",
            "gpu_mem_limit": "4096",
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
            "enable_cuda_graph": "1",
            "use_ep_level_unified_stream": "1",
        },
    )
    assert chosen.cuda_graphs
    assert not chosen.pinned_outputs


def test_openvino_stands_before_the_cpu_where_it_is_asked_for_and_present():
    text = 'optimization { execution_accelerators { cpu_execution_accelerator { name: "openvino" } } }'
    assert names(one(text, [OPENVINO, CPU])) == [OPENVINO, CPU]
    chosen = one(text, [CPU])
    assert (names(chosen), chosen.missing) == ([CPU], (OPENVINO,))


@pytest.mark.parametrize("name", ["cache_dir", "load_config", "context"])
def test_openvino_takes_no_path_and_no_address(name):
    text = accelerator("cpu", "openvino", f'parameters {{ key: "{name}" value: "/tmp" }}')
    with pytest.raises(ConfigError, match=f"'{name}' of openvino"):
        execution.executions(config(text), [OPENVINO, CPU])


def test_engines_of_tensorrt_are_cached_in_the_folder_of_the_worker():
    text = accelerator("gpu", "tensorrt", 'parameters { key: "trt_engine_cache_enable" value: "1" }')
    (chosen,) = execution.executions(config(text), GPU_BUILD, "/state/engines")
    assert chosen.providers[0][1]["trt_engine_cache_path"] == "/state/engines"


def test_a_folder_for_engines_in_the_configuration_gives_way_to_the_workers_and_is_reported():
    paths = "".join(
        f'parameters {{ key: "trt_{cache}_cache_{field}" value: "{value}" }}'
        for cache in ("engine", "timing")
        for field, value in (("enable", "1"), ("path", "/models/1"))
    )
    text = accelerator("gpu", "tensorrt", paths)
    (chosen,) = execution.executions(config(text), GPU_BUILD, "/state/engines")
    assert "/models/1" not in chosen.providers[0][1].values()
    assert chosen.providers[0][1]["trt_timing_cache_path"] == "/state/engines"
    assert [path.rpartition(".")[2] for path in ignored_fields(config(text))] == [
        "trt_engine_cache_path",
        "trt_timing_cache_path",
    ]


@pytest.mark.parametrize(("text", "on"), [("1", True), ("true", True), ("On", True), ("0", False), ("False", False)])
def test_parameters_that_are_booleans_are_read_as_triton_reads_them(text, on):
    given = f'parameters {{ key: "enable_mem_pattern" value {{ string_value: "{text}" }} }}'
    assert execution.session_options(config(given), 1).enable_mem_pattern is on


def accelerator(kind, name, parameters=""):
    return f"""optimization {{ execution_accelerators {{ {kind}_execution_accelerator {{
        name: "{name}" {parameters} }} }} }}"""


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (accelerator("gpu", "tensorflow"), "'tensorflow'.*tensorrt and cuda"),
        (accelerator("cpu", "mkl") + "instance_group { kind: KIND_CPU }", "'mkl'.*openvino"),
        (accelerator("gpu", "tensorrt", 'parameters { key: "precision_mode" value: "FP8" }'), "'FP8'.*FP16"),
        (accelerator("gpu", "tensorrt", 'parameters { key: "precision" value: "FP16" }'), "'precision'.*trt_"),
        *(
            (accelerator("gpu", "tensorrt", f'parameters {{ key: "{name}" value: "x" }}'), f"'{name}'.*worker's")
            for name in (
                *("trt_extra_plugin_lib_paths", "trt_engine_decryption_lib_path"),
                *("trt_engine_cache_prefix", "trt_ep_context_file_path"),
                *("trt_onnx_model_folder_path", "trt_dump_subgraphs", "trt_int8_calibration_table_name"),
            )
        ),
        (accelerator("gpu", "cuda", 'parameters { key: "gpu_external_alloc" value: "1" }'), "'gpu_external_alloc'"),
        (accelerator("gpu", "cuda", 'parameters { key: "user_compute_stream" value: "1" }'), "'user_compute_stream'"),
        ("instance_group [ { kind: KIND_GPU }, { kind: KIND_CPU } ]", "one kind"),
        ('parameters { key: "cudnn_conv_algo_search" value { string_value: "3" } }', "'3'; it is 0 or 1 or 2"),
        ('parameters { key: "gpu_mem_limit" value { string_value: "much" } }', "'much'; it is a whole number"),
    ],
)
def test_what_it_cannot_be_is_refused_with_what_it_can(text, wrong):
    with pytest.raises(ConfigError, match=wrong):
        execution.executions(config(text), GPU_BUILD)


def test_a_session_has_the_threads_of_the_worker_unless_its_configuration_says_others():
    assert execution.session_options(config(""), 3).intra_op_num_threads == 3
    own = 'parameters { key: "intra_op_thread_count" value { string_value: "2" } }'
    assert execution.session_options(config(own), 3).intra_op_num_threads == 2


@pytest.mark.parametrize(("instances", "threads"), [(1, 4), (2, 2), (3, 1), (8, 1)])
def test_the_instances_of_a_model_share_the_threads_of_the_worker(instances, threads):
    configured = config(f"instance_group {{ count: {instances} kind: KIND_CPU }}")
    assert execution.session_options(configured, 4).intra_op_num_threads == threads


@pytest.mark.parametrize(("instances", "threads", "runs"), [(1, 4, 1), (2, 4, 2), (8, 4, 4), (2, 1, 1)])
def test_on_the_cpu_no_more_runs_are_made_at_a_time_than_there_are_threads(instances, threads, runs):
    configured = config(f"instance_group {{ count: {instances} }}")
    assert execution.concurrent_runs(configured, threads, CPU) == runs
    assert execution.concurrent_runs(configured, threads, CUDA) == instances


@pytest.mark.parametrize(("level", "name"), [(0, "ALL"), (-1, "BASIC"), (1, "EXTENDED"), (2, "DISABLE_ALL")])
def test_levels_of_graph_optimization_are_tritons(level, name):
    options = execution.session_options(config(f"optimization {{ graph {{ level: {level} }} }}"), 1)
    assert options.graph_optimization_level.name.endswith(name)
