"""Configurations that public repositories use with ONNX models, in words of our own over small models of our own.

Each has the fields, the names, the datatypes and the dims of its original; the graphs compute little. `triton_models`
has those of Triton's example repository. docs/migrating.md has the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

SAME, DIFFERENT, NOT_SERVED = "same", "different", "not served"
CPU_FALLBACK = "a GPU is asked for and there is none: Triton refuses the model, here it runs on the CPU, with a warning"


@dataclass(frozen=True)
class Case:
    """`origin`: where such a configuration is used. `why`: the row of the table. `refused`: words of the reason why it
    does not load; () if it is served. `no_effect`: fields that are reported so. `served`: of `versions`."""

    origin: str
    config: str
    graph: str = ""
    result: str = SAME
    why: str = ""
    refused: Sequence[str] = ()
    no_effect: Sequence[str] = ()
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: type = np.float32
    file: str = "model.onnx"
    versions: Sequence[int] = (1,)
    served: Sequence[str] = ("1",)
    files: Mapping[str, bytes] = field(default_factory=dict)


def _tensor(kind: str, name: str, datatype: str, dims: str, more: str = "") -> str:
    return f"{kind} [ {{ name: '{name}' data_type: TYPE_{datatype} dims: [ {dims} ] {more} }} ]\n"


def _input(name: str, datatype: str, dims: str, more: str = "") -> str:
    return _tensor("input", name, datatype, dims, more)


def _output(name: str, datatype: str, dims: str, more: str = "") -> str:
    return _tensor("output", name, datatype, dims, more)


def _control(name: str, kind: str, values: str) -> str:
    return f"{{ name: '{name}' control [ {{ kind: CONTROL_SEQUENCE_{kind} {values} }} ] }}"


def _state(name: str, datatype: str, dims: str, initial: str = "zero_data: true") -> str:
    return f"""{{
        input_name: "{name}" output_name: "r_{name}" data_type: TYPE_{datatype} dims: [ {dims} ]
        initial_state: {{ data_type: TYPE_{datatype} dims: [ {dims} ] {initial} name: "initial state" }}
    }}"""


_GPU = "instance_group [ { count: 1 kind: KIND_GPU gpus: [ 0 ] } ]\n"
_OF_TUTORIALS = "triton-inference-server/tutorials, Conceptual_Guide"
_OF_QA = "triton-inference-server/server, qa"
_OF_DOCS = "triton-inference-server/server, docs/user_guide"

# An image of one channel becomes 26 letters out of 37.
_LETTERS = """(float[n,1,32,100] "input.1") => (float[n,26,37] "308") {
    A = ReduceMean<axes = [3], keepdims = 0>("input.1")
    B = ReduceMean<axes = [2], keepdims = 1>(A)
    "308" = Mul(B, weights)
}"""
_RECOGNITION = _input("input.1", "FP32", "1, 32, 100") + _output("308", "FP32", "26, 37")
_OF_LETTERS = {"weights": (26, 37)}


def _same(kind: str, inputs: str = "INPUT0", outputs: str = "OUTPUT0") -> str:
    return f"({kind} {inputs}) => ({kind} {outputs}) {{ {outputs} = Identity({inputs}) }}"


_PAIR = """(int32[n,16] INPUT0, int32[n,16] INPUT1) => (int8[n,16] OUTPUT0, int8[n,16] OUTPUT1) {
    A = Add(INPUT0, INPUT1) B = Sub(INPUT0, INPUT1) OUTPUT0 = Cast<to = 3>(A) OUTPUT1 = Cast<to = 3>(B)
}"""
_PAIR_INPUTS = _input("INPUT0", "INT32", "16") + _input("INPUT1", "INT32", "16")
_PAIR_OUTPUTS = _output("OUTPUT0", "INT8", "16") + _output("OUTPUT1", "INT8", "16")

CASES: dict[str, Case] = {
    "text_detection": Case(
        f"{_OF_TUTORIALS}/Part_1",
        'backend: "onnxruntime" max_batch_size : 0\n'
        + _input("input_images:0", "FP32", "-1, -1, -1, 3")
        + _output("feature_fusion/Conv_7/Sigmoid:0", "FP32", "-1, -1, -1, 1")
        + _output("feature_fusion/concat_3:0", "FP32", "-1, -1, -1, 5"),
        """(float[n,h,w,3] "input_images:0")
        => (float[n,h,w,1] "feature_fusion/Conv_7/Sigmoid:0", float[n,h,w,5] "feature_fusion/concat_3:0") {
          A = ReduceMean<axes = [3], keepdims = 1>("input_images:0")
          "feature_fusion/Conv_7/Sigmoid:0" = Sigmoid(A)
          "feature_fusion/concat_3:0" = Concat<axis = 3>(A, A, A, A, A)
        }""",
    ),
    "text_recognition": Case(
        f"{_OF_TUTORIALS}/Part_2",
        f"""
        # Batches of the requests that queue, on two instances.
        backend: "onnxruntime"
        max_batch_size : 8
        {_RECOGNITION}
        dynamic_batching {{ }}
        instance_group [ {{ count: 2 kind: KIND_GPU }} ]
        """,
        _LETTERS,
        DIFFERENT,
        CPU_FALLBACK,
        weights=_OF_LETTERS,
    ),
    "text_recognition_trt": Case(
        f"{_OF_TUTORIALS}/Part_4, ORT_TRT_config.pbtxt",
        f"""
        backend: "onnxruntime" max_batch_size : 16
        {_RECOGNITION}
        model_warmup {{
          name: "text_recognition" batch_size: 16
          inputs: {{
            key: "input.1" value: {{ data_type: TYPE_FP32 dims: 1 dims: 32 dims: 100 zero_data: true }}
          }}
        }}
        optimization {{
          graph : {{ level : 1 }}
          execution_accelerators {{
            gpu_execution_accelerator : [ {{
              name : "tensorrt",
              parameters {{ key: "precision_mode" value: "FP16" }},
              parameters {{ key: "max_workspace_size_bytes" value: "1073741824" }}
            }} ]
          }}
        }}
        """,
        _LETTERS,
        weights=_OF_LETTERS,
    ),
    "text_recognition_cuda": Case(
        f"{_OF_TUTORIALS}/Part_4, ORT_cuda_ep_config.pbtxt",
        f"""
        backend: "onnxruntime" max_batch_size : 16
        {_RECOGNITION}
        parameters {{ key: "cudnn_conv_algo_search" value: {{ string_value: "0" }} }}
        parameters {{ key: "gpu_mem_limit" value: {{ string_value: "4294967200" }} }}
        """,
        _LETTERS,
        weights=_OF_LETTERS,
    ),
    "text_recognition_openvino": Case(
        f"{_OF_TUTORIALS}/Part_4, ORT_openvino_config.pbtxt",
        f"""
        backend: "onnxruntime" max_batch_size : 16
        {_RECOGNITION}
        optimization {{ execution_accelerators {{ cpu_execution_accelerator : [ {{ name : "openvino" }} ] }}}}
        """,
        _LETTERS,
        DIFFERENT,
        "Triton's image has OpenVINO; here it is used if onnxruntime-openvino is installed, else the CPU provider",
        weights=_OF_LETTERS,
    ),
    "text_encoder": Case(
        f"{_OF_TUTORIALS}/Part_6",
        f"""
        platform: "onnxruntime_onnx" max_batch_size: 8
        {_input("input_ids", "INT32", "-1")}
        output [
          {{ name: "pooler_output" data_type: TYPE_FP32 dims: [ 768 ] }},
          {{ name: "last_hidden_state" data_type: TYPE_FP32 dims: [ -1, 768 ] }}
        ]
        instance_group [ {{ kind: KIND_GPU }} ]
        optimization {{ graph : {{ level : 1 }} }}
        parameters {{ key: "execution_mode" value: {{ string_value: "1" }} }}
        parameters {{ key: "cudnn_conv_algo_search" value: {{ string_value: "0" }} }}
        """,
        """(int32[n,s] input_ids) => (float[n,768] pooler_output, float[n,s,768] last_hidden_state) {
          last_hidden_state = Gather(weights, input_ids)
          pooler_output = ReduceMean<axes = [1], keepdims = 0>(last_hidden_state)
        }""",
        DIFFERENT,
        CPU_FALLBACK,
        weights={"weights": (10, 768)},
    ),
    "ensemble_model": Case(
        f"{_OF_TUTORIALS}/Part_5",
        """
        platform: "ensemble" max_batch_size: 256
        input [ { name: "input_image" data_type: TYPE_UINT8 dims: [ -1 ] } ]
        output [ { name: "recognized_text" data_type: TYPE_FP32 dims: [ 26, 37 ] } ]
        ensemble_scheduling {
          step [
            {
              model_name: "detection_preprocessing" model_version: -1
              input_map { key: "detection_preprocessing_input" value: "input_image" }
              output_map { key: "detection_preprocessing_output" value: "cropped_images" }
            },
            {
              model_name: "text_recognition_cuda" model_version: -1
              input_map { key: "input.1" value: "cropped_images" } output_map { key: "308" value: "recognized_text" }
            }
          ]
        }
        """,
        why="steps of Triton's Python backend have to become ONNX models",
    ),
    "detection_preprocessing": Case(
        f"{_OF_TUTORIALS}/Part_5, whose step is of the Python backend",
        "max_batch_size: 256\n"
        + _input("detection_preprocessing_input", "UINT8", "-1")
        + _output("detection_preprocessing_output", "FP32", "1, 32, 100"),
        """(uint8[n,k] detection_preprocessing_input) => (float[n,1,32,100] detection_preprocessing_output)
        <int64[2] axes = {2, 3}> {
          A = Cast<to = 1>(detection_preprocessing_input)
          B = ReduceMean<axes = [1], keepdims = 1>(A)
          C = Unsqueeze(B, axes)
          detection_preprocessing_output = Mul(C, weights)
        }""",
        weights={"weights": (32, 100)},
    ),
    "onnx_float32_int32_int32": Case(
        "triton-inference-server/server, deploy/mlflow-triton-plugin/examples",
        'platform: "onnxruntime_onnx" max_batch_size: 8 version_policy: { latest { num_versions: 1 }}\n'
        + _input("INPUT0", "FP32", "16")
        + _input("INPUT1", "FP32", "16")
        + _output("OUTPUT0", "INT32", "16")
        + _output("OUTPUT1", "INT32", "16"),
        """(float[n,16] INPUT0, float[n,16] INPUT1) => (int32[n,16] OUTPUT0, int32[n,16] OUTPUT1) {
          A = Add(INPUT0, INPUT1) B = Sub(INPUT0, INPUT1) OUTPUT0 = Cast<to = 6>(A) OUTPUT1 = Cast<to = 6>(B)
        }""",
    ),
    "identity": Case(
        "triton-inference-server/server, src/python/examples/example_model_repository",
        'platform: "onnxruntime_onnx" max_batch_size: 8 version_policy: { latest { num_versions: 1 }}\n'
        + _input("INPUT0", "STRING", "-1")
        + _output("OUTPUT0", "STRING", "-1"),
        _same("string[n,m]"),
    ),
    "add_with_initializer": Case(
        f"{_OF_QA}/L0_initializer_as_input",
        """
        platform: "onnxruntime_onnx" max_batch_size: 0
        input [
          { name: "INPUT" data_type: TYPE_FP32 dims: [5, 5] },
          { name: "INITIALIZER" data_type: TYPE_FP32 dims: [5, 5] optional: true }
        ]
        output [ { name: "OUTPUT" data_type: TYPE_FP32 dims: [ 5, 5] } ]
        """,
        "(float[5,5] INPUT, float[5,5] INITIALIZER) => (float[5,5] OUTPUT) { OUTPUT = Add(INPUT, INITIALIZER) }",
        weights={"INITIALIZER": (5, 5)},
    ),
    "add_bf16": Case(
        f"{_OF_QA}/L0_backend_onnxruntime",
        'platform: "onnxruntime_onnx" max_batch_size: 0\n'
        + _input("INPUT0", "BF16", "5, 5")
        + _output("OUTPUT", "BF16", "5, 5")
        + "instance_group: { kind: KIND_GPU }",
        _same("bfloat16[5,5]", outputs="OUTPUT"),
        DIFFERENT,
        CPU_FALLBACK,
    ),
    "cpu_instance": Case(
        f"{_OF_QA}/L0_model_config/autofill_noplatform_success/onnx",
        'platform: "onnxruntime_onnx" max_batch_size: 8 version_policy: { latest { num_versions: 1 }}\n'
        + _input("INPUT0", "FP16", "-1,-1")
        + _output("OUTPUT0", "FP16", "-1,-1")
        + 'instance_group { name: "cpu_instance" kind: KIND_CPU }',
        _same("float16[n,h,w]"),
    ),
    "empty_config": Case(
        f"{_OF_QA}/L0_model_config/autofill_noplatform_success/onnx",
        "",
        _same("float[n,16]"),
        DIFFERENT,
        "both complete it from the file; Triton batches up to 4 rows, Ringmesh up to `RINGMESH_MAX_BATCH_ROWS` if rows "
        "are proven independent",
    ),
    "no_config_no_batch": Case(
        f"{_OF_QA}/L0_model_config/autofill_noplatform_success/onnx",
        "instance_group [ { kind: KIND_CPU } ]",
        _same("float[16]"),
    ),
    "onnx_scalar_1dim": Case(
        f"{_OF_QA}/common/gen_qa_ort_scalar_models.py",
        _input("INPUT", "FP32", "1") + _output("OUTPUT", "FP32", "1"),
        _same("float", "INPUT", "OUTPUT"),
    ),
    "onnx_zero_1_float32": Case(
        f"{_OF_QA}/common/gen_qa_reshape_models.py",
        'platform: "onnxruntime_onnx" max_batch_size: 8\n'
        + _input("INPUT__0", "FP32", "4, 4", "reshape { shape: [ 2, 2, 4 ] }")
        + _output("OUTPUT__0", "FP32", "16", "reshape { shape: [ 2, 2, 4 ] }"),
        _same("float[n,2,2,4]", "INPUT__0", "OUTPUT__0"),
    ),
    "onnx_sequence_float32": Case(
        f"{_OF_QA}/common/gen_qa_sequence_models.py",
        f"""
        platform: "onnxruntime_onnx" max_batch_size: 8
        {_input("INPUT", "FP32", "1")} {_output("OUTPUT", "FP32", "1")}
        sequence_batching {{
          max_sequence_idle_microseconds: 5000000
          direct {{ max_queue_delay_microseconds: 100 minimum_slot_utilization: 0 }}
          control_input [
            {_control("START", "START", "fp32_false_true: [ 0, 1 ]")},
            {_control("READY", "READY", "fp32_false_true: [ 0, 1 ]")}
          ]
        }}
        """,
        """(float[n,1] INPUT, float[n,1] START, float[n,1] READY) => (float[n,1] OUTPUT) {
          A = Add(INPUT, START) OUTPUT = Mul(A, READY)
        }""",
    ),
    "onnx_nobatch_sequence_int32": Case(
        f"{_OF_QA}/common/gen_qa_implicit_models.py, L0_implicit_state",
        f"""
        platform: "onnxruntime_onnx" max_batch_size: 0
        {_input("INPUT", "INT32", "1")} {_output("OUTPUT", "INT32", "1")}
        sequence_batching {{
          max_sequence_idle_microseconds: 5000000
          control_input [
            {_control("START", "START", "int32_false_true: [ 0, 1 ]")},
            {_control("READY", "READY", "int32_false_true: [ 0, 1 ]")}
          ]
          state [ {{
            input_name: "INPUT_STATE" output_name: "OUTPUT_STATE" data_type: TYPE_INT32 dims: [ 1 ]
            use_same_buffer_for_input_output: true
            initial_state: {{ name: "state init" data_type: TYPE_INT32 dims: [ 1 ] data_file: "input_state_data" }}
          }} ]
        }}
        """,
        """(int32[1] INPUT, int32[1] START, int32[1] READY, int32[1] INPUT_STATE)
        => (int32[1] OUTPUT, int32[1] OUTPUT_STATE) {
          A = Add(INPUT, INPUT_STATE) B = Add(A, START) OUTPUT = Mul(B, READY) OUTPUT_STATE = Identity(OUTPUT)
        }""",
        no_effect=("sequence_batching.state.use_same_buffer_for_input_output",),
        files={"initial_state/input_state_data": np.array([100], np.int32).tobytes()},
    ),
    "onnx_batch_input": Case(
        f"{_OF_QA}/common/gen_qa_ragged_models.py",
        f"""
        backend: "onnxruntime" max_batch_size: 16 version_policy: {{ latest {{ num_versions: 1 }} }}
        {_input("RAGGED_INPUT", "FP32", "-1", "allow_ragged_batch: true")}
        {_output("RAGGED_OUTPUT", "FP32", "-1")} {_output("BATCH_OUTPUT", "FP32", "-1")}
        batch_input [ {{
          kind: BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO target_name: "BATCH_INPUT" data_type: TYPE_FP32
          source_input: "RAGGED_INPUT"
        }} ]
        dynamic_batching {{ max_queue_delay_microseconds: 1000000 }}
        """,
        """(float[n] RAGGED_INPUT, float[m] BATCH_INPUT) => (float[n] RAGGED_OUTPUT, float[m] BATCH_OUTPUT) {
          RAGGED_OUTPUT = Identity(RAGGED_INPUT) BATCH_OUTPUT = Identity(BATCH_INPUT)
        }""",
        NOT_SERVED,
        "ragged batches; requests of one shape share a run without them",
        ["allow_ragged_batch of RAGGED_INPUT"],
    ),
    "onnx_batch_item": Case(
        f"{_OF_QA}/common/gen_qa_ragged_models.py",
        f"""
        backend: "onnxruntime" max_batch_size: 16
        {_input("INPUT", "FP32", "-1")} {_output("BATCH_OUTPUT", "FP32", "-1")}
        batch_input [ {{
          kind: BATCH_ITEM_SHAPE target_name: "BATCH_INPUT" data_type: TYPE_FP32 source_input: "INPUT"
        }} ]
        """,
        """(float[n,m] INPUT, float[n,1] BATCH_INPUT) => (float[n,m] BATCH_OUTPUT) {
          BATCH_OUTPUT = Mul(INPUT, BATCH_INPUT)
        }""",
        NOT_SERVED,
        "`batch_input`, which belongs to ragged batches",
        ["batch_input for 'BATCH_INPUT'"],
    ),
    "onnx_custom_op": Case(
        f"{_OF_QA}/common/gen_qa_custom_ops_models.py",
        f"""
        platform: "onnxruntime_onnx" max_batch_size: 0
        {_input("input_1", "FP32", "3, 5")} {_output("output", "INT32", "3, 5")}
        model_operations {{ op_library_filename: "libcustom_op_library.so" }}
        """,
        "(float[3,5] input_1) => (int32[3,5] output) { output = Cast<to = 6>(input_1) }",
        NOT_SERVED,
        "libraries of custom operators are not loaded",
        ["model_operations.op_library_filename names libcustom_op_library.so"],
    ),
    "bad_input_dims": Case(
        f"{_OF_QA}/L0_model_config/autofill_noplatform/onnx",
        f"max_batch_size: 1 {_input('INPUT0', 'INT32', '16, 1')} {_input('INPUT1', 'INT32', '16')} {_PAIR_OUTPUTS}",
        _PAIR,
        refused=["gives 'INPUT0' dims [16, 1]", "they should be [16]"],
    ),
    "unknown_input": Case(
        f"{_OF_QA}/L0_model_config/autofill_noplatform/onnx",
        f"max_batch_size: 1 {_input('INPUT_UNKNOWN', 'INT32', '16')} {_PAIR_OUTPUTS}",
        _PAIR,
        refused=["names 'INPUT_UNKNOWN'; the file has 'INPUT0', 'INPUT1'"],
    ),
    "unknown_output": Case(
        f"{_OF_QA}/L0_model_config/autofill_noplatform/onnx",
        f"max_batch_size: 1 {_PAIR_INPUTS} {_output('OUTPUT_UNKNOWN', 'INT8', '16')}",
        _PAIR,
        refused=["names 'OUTPUT_UNKNOWN'; the file has 'OUTPUT0', 'OUTPUT1'"],
    ),
    "too_few_inputs": Case(
        f"{_OF_QA}/L0_model_config/autofill_noplatform/onnx",
        f"max_batch_size: 1 {_input('INPUT1', 'INT32', '16')} {_PAIR_OUTPUTS}",
        _PAIR,
        DIFFERENT,
        "Triton refuses a list of inputs with one missing; here the file completes it",
    ),
    "embedded_ensemble": Case(
        f"{_OF_QA}/L0_model_config/autofill_noplatform_success/ensemble",
        """
        max_batch_size: 2 platform: "ensemble"
        ensemble_scheduling { step [ {
          model_name: "image_ensemble" model_version: -1
          input_map { key: "IMAGE" value: "data" } output_map { key: "CLASSES" value: "prob" }
        } ] }
        input [ { name: "data" data_type: TYPE_FP32 dims: [ 3, 224, 224 ] } ]
        output [ { name: "prob" data_type: TYPE_FP32 dims: [ 1000 ] } ]
        """,
        result=NOT_SERVED,
        why="an ensemble as the step of another",
        refused=["step 'image_ensemble' is an ensemble; a step must be a model"],
    ),
    "repoagent_checksum": Case(
        f"{_OF_QA}/L0_repoagent_checksum",
        f"""
        platform: "onnxruntime_onnx" max_batch_size: 0
        {_input("INPUT0", "INT32", "-1")} {_output("OUTPUT0", "INT32", "-1")}
        instance_group [ {{ count: 1 kind : KIND_CPU }} ]
        model_repository_agents {{ agents [ {{
          name: "checksum", parameters [ {{ key: "MD5:1/model.onnx", value: "0" }} ]
        }} ] }}
        """,
        _same("int32[n]"),
        DIFFERENT,
        "agents have no effect; models may be [signed](operations.md#signed-models)",
        no_effect=["model_repository_agents"],
    ),
    "batcher_priorities": Case(
        f"{_OF_DOCS}/batcher.md",
        f"""
        platform: "onnxruntime_onnx" max_batch_size: 8
        {_input("INPUT0", "FP32", "16")} {_output("OUTPUT0", "FP32", "16")}
        dynamic_batching {{
          preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 preserve_ordering: false
          priority_levels: 2 default_priority_level: 2
          default_queue_policy {{
            timeout_action: REJECT default_timeout_microseconds: 60000000 allow_timeout_override: true
            max_queue_size: 100
          }}
          priority_queue_policy [ {{ key: 1 value: {{ timeout_action: DELAY max_queue_size: 10 }} }} ]
        }}
        """,
        _same("float[n,16]"),
        DIFFERENT,
        "a full queue and a passed timeout have [other statuses](models.md#intended-differences-from-triton)",
    ),
    "rate_limited": Case(
        f"{_OF_DOCS}/rate_limiter.md",
        f"""
        platform: "onnxruntime_onnx" max_batch_size: 8
        {_input("INPUT0", "FP32", "16")} {_output("OUTPUT0", "FP32", "16")}
        instance_group [ {{
          count: 2 kind: KIND_CPU
          rate_limiter {{ resources [ {{ name: "R1" count: 4 }}, {{ name: "R2" global: True count: 2 }} ] priority: 2 }}
        }} ]
        metric_tags {{ key: "team" value: "vision" }}
        """,
        _same("float[n,16]"),
        DIFFERENT,
        "`rate_limiter` and `metric_tags` have no effect",
        no_effect=("metric_tags", "instance_group.rate_limiter"),
    ),
    "cached": Case(
        f"{_OF_DOCS}/response_cache.md",
        'platform: "onnxruntime_onnx" max_batch_size: 8\n'
        + _input("INPUT0", "FP32", "16")
        + _output("OUTPUT0", "FP32", "16")
        + "response_cache { enable: true } model_transaction_policy { decoupled: false }",
        _same("float[n,16]"),
    ),
    "warmed_up": Case(
        f"{_OF_QA}/L0_warmup",
        f"""
        platform: "onnxruntime_onnx" max_batch_size: 8
        {_input("INPUT0", "INT32", "4")} {_output("OUTPUT0", "INT32", "4")}
        model_warmup [
          {{ name: "zero" batch_size: 1 inputs {{ key: "INPUT0" value {{
            data_type: TYPE_INT32 dims: [ 4 ] zero_data: true }} }} }},
          {{ name: "random" batch_size: 8 count: 2 inputs {{ key: "INPUT0" value {{
            data_type: TYPE_INT32 dims: [ 4 ] random_data: true }} }} }},
          {{ name: "file" batch_size: 1 inputs {{ key: "INPUT0" value {{
            data_type: TYPE_INT32 dims: [ 4 ] input_data_file: "raw_data" }} }} }}
        ]
        """,
        _same("int32[n,4]"),
        files={"warmup/raw_data": bytes(16)},
    ),
    "ort_options": Case(
        "triton-inference-server/onnxruntime_backend, README.md",
        f"""
        backend: "onnxruntime" max_batch_size: 0
        {_input("INPUT0", "FP32", "-1")} {_output("OUTPUT0", "FP32", "-1")}
        optimization {{ graph : {{ level : 1 }} }}
        parameters {{ key: "intra_op_thread_count" value: {{ string_value: "0" }} }}
        parameters {{ key: "execution_mode" value: {{ string_value: "0" }} }}
        parameters {{ key: "inter_op_thread_count" value: {{ string_value: "0" }} }}
        parameters {{ key: "enable_mem_arena" value: {{ string_value: "true" }} }}
        parameters {{ key: "enable_mem_pattern" value: {{ string_value: "0" }} }}
        parameters {{ key: "memory.enable_memory_arena_shrinkage" value: {{ string_value: "cpu:0" }} }}
        """,
        _same("float[n]"),
    ),
    "auto_instances": Case(
        "several repositories that name GPUs, but no kind",
        'platform: "onnxruntime_onnx" max_batch_size: 8\n'
        + _input("INPUT0", "FP32", "16")
        + _output("OUTPUT0", "FP32", "16")
        + "instance_group [ { count: 2 gpus: [ 0, 1 ] } ]",
        _same("float[n,16]"),
        DIFFERENT,
        CPU_FALLBACK,
    ),
    "model_in_a_folder": Case(
        f"{_OF_DOCS}/model_repository.md",
        "",
        _same("int64[4]"),
        file="model.onnx/model.onnx",
        why="`model.onnx` is a folder with the model and its external data",
    ),
    "no_batches": Case(
        "several repositories with YOLO and OCR models",
        'platform: "onnxruntime_onnx" max_batch_size: 0\n'
        + _input("x", "FP32", "-1, 3, 32, 32")
        + _output("y", "FP32", "-1, 3, -1, -1")
        + "dynamic_batching { max_queue_delay_microseconds: 100 }",
        _same("float[n,3,h,w]", "x", "y"),
    ),
    "fixed_output": Case(
        "several repositories with models that were exported with free sizes",
        'platform: "onnxruntime_onnx" max_batch_size: 4\n'
        + _input("x", "FP32", "3, 32, 32")
        + _output("y", "FP32", "3, 32, 32"),
        _same("float[n,3,h,w]", "x", "y"),
        DIFFERENT,
        "`dims` of an output that fix sizes which the file leaves free: Triton refuses them",
    ),
    "decoupled": Case(
        "several repositories that copy the settings of streaming models",
        'platform: "onnxruntime_onnx" max_batch_size: 0\n'
        + _input("INPUT0", "FP32", "-1")
        + _output("OUTPUT0", "FP32", "-1")
        + "model_transaction_policy { decoupled: True }",
        _same("float[n]"),
        NOT_SERVED,
        "decoupled models; Triton serves them by streams only, with one answer for each request",
        ["model_transaction_policy.decoupled is true"],
    ),
    "bert-onnx": Case(
        "NVIDIA/DeepLearningExamples, PyTorch/SpeechSynthesis/Tacotron2/notebooks/conversationalai",
        f"""
        platform: "onnxruntime_onnx" max_batch_size: 8
        input [
          {{ name: "input__0" data_type: TYPE_INT64 dims: [384] }},
          {{ name: "input__1" data_type: TYPE_INT64 dims: [384] }},
          {{ name: "input__2" data_type: TYPE_INT64 dims: [384] }}
        ]
        output [
          {{ name: "output__0" data_type: TYPE_FP16 dims: [384] }},
          {{ name: "output__1" data_type: TYPE_FP16 dims: [384] }}
        ]
        optimization {{ cuda {{ graphs: 0 }} }}
        {_GPU}
        """,
        """(int64[n,384] input__0, int64[n,384] input__1, int64[n,384] input__2)
        => (float16[n,384] output__0, float16[n,384] output__1) {
          A = Add(input__0, input__1) B = Mul(A, input__2)
          output__0 = Cast<to = 10>(A) output__1 = Cast<to = 10>(B)
        }""",
        DIFFERENT,
        CPU_FALLBACK,
    ),
    "jasper-onnx": Case(
        "NVIDIA/DeepLearningExamples, PyTorch/SpeechRecognition/Jasper/triton",
        """
        platform: "onnxruntime_onnx"
        default_model_filename: "model.onnx"
        max_batch_size: 8#MAX_BATCH
        input [ { name: "input__0" data_type: TYPE_FP16 dims: [64, -1] } ]
        output [ { name: "output__0" data_type: TYPE_FP16 dims: [-1, 29 ] } ]
        instance_group { count: 1#NUM_ENGINES
          gpus: 0 kind: KIND_GPU }
        optimization { execution_accelerators { gpu_execution_accelerator : [ { name : "tensorrt" } ] } }
        #db#dynamic_batching {
        #db#    preferred_batch_size: 8#MAX_BATCH
        #db#}
        """,
        """(float16[n,64,t] input__0) => (float16[n,t,29] output__0) {
          A = Transpose<perm = [0, 2, 1]>(input__0) output__0 = MatMul(A, weights)
        }""",
        DIFFERENT,
        CPU_FALLBACK,
        weights={"weights": (64, 29)},
        dtype=np.float16,
    ),
    "centerface": Case(
        "NVIDIA-AI-IOT/deepstream_triton_model_deploy",
        """
        platform: "onnxruntime_onnx" max_batch_size: 0
        input [ { name: "input.1" data_type: TYPE_FP32
        #    format: FORMAT_NCHW
            dims: [ -1, 3, 480, 640] } ]
        output [
          { name: "537" data_type: TYPE_FP32 dims: [ -1, 1, -1, -1 ] label_filename: "centerface_labels.txt" },
          { name: "538" data_type: TYPE_FP32 dims: [ -1, 2, -1, -1] label_filename: "centerface_labels.txt" }
        ]
        instance_group { count: 1 gpus: 0 kind: KIND_GPU }
        """,
        """(float[n,3,h,w] "input.1") => (float[n,1,x,y] "537", float[n,2,x,y] "538") {
          A = MaxPool<kernel_shape = [32, 32], strides = [32, 32]>("input.1")
          "537" = Conv(A, one) "538" = Conv(A, two)
        }""",
        DIFFERENT,
        CPU_FALLBACK,
        weights={"one": (1, 3, 1, 1), "two": (2, 3, 1, 1)},
        files={"centerface_labels.txt": b"face\n"},
    ),
    "encoder": Case(
        "wenet-e2e/wenet, runtime/gpu/model_repo_stateful",
        f"""
        backend: "onnxruntime"
        default_model_filename: "encoder.onnx"
        max_batch_size: 512
        sequence_batching{{
          max_sequence_idle_microseconds: 5000000
          oldest {{ max_candidate_sequences: 1024 max_queue_delay_microseconds: 5000 }}
          control_input [
          ]
          state [
            {_state("offset", "INT64", "1")}, {_state("att_cache", "FP32", "2, 4, 3, 8")},
            {_state("cache_mask", "FP32", "1, 3")}
          ]
        }}
        input [
          {{ name: "chunk_xs" data_type: TYPE_FP32 dims: [67, 80] }},
          {{ name: "chunk_lens" data_type: TYPE_INT32 dims: [ 1 ] reshape: {{ shape: [] }} }}
        ]
        output [
          {{ name: "log_probs" data_type: TYPE_FP32 dims: [-1, 10] # [-1, beam_size]
          }},
          {{ name: "log_probs_idx" data_type: TYPE_INT64 dims: [-1, 10] }},
          {{ name: "chunk_out_lens" data_type: TYPE_INT32 dims: [1] reshape: {{ shape: [] }} }}
        ]
        instance_group [ {{ count: 2 kind: KIND_GPU }} ]
        """,
        """(float[n,67,80] chunk_xs, int32[n] chunk_lens, int64[n,1] offset, float[n,2,4,3,8] att_cache,
         float[n,1,3] cache_mask)
        => (float[n,67,10] log_probs, int64[n,67,10] log_probs_idx, int32[n] chunk_out_lens, int64[n,1] r_offset,
            float[n,2,4,3,8] r_att_cache, float[n,1,3] r_cache_mask)
        <int64[1] step = {67}, int64[1] last = {2}, float[1] more = {0.5}> {
          A = MatMul(chunk_xs, weights)
          B = Cast<to = 1>(offset)
          C = Unsqueeze(B, last)
          D = ReduceMean<axes = [2], keepdims = 1>(cache_mask)
          E = Add(A, C)
          log_probs = Add(E, D)
          log_probs_idx = Cast<to = 7>(log_probs)
          chunk_out_lens = Identity(chunk_lens)
          r_offset = Add(offset, step)
          r_att_cache = Add(att_cache, more)
          r_cache_mask = Add(cache_mask, more)
        }""",
        DIFFERENT,
        CPU_FALLBACK,
        no_effect=("sequence_batching.oldest.max_candidate_sequences",),
        weights={"weights": (80, 10)},
        file="encoder.onnx",
    ),
    "streaming_encoder": Case(
        "a streaming Zipformer of k2-fsa/sherpa",
        f"""
        version_policy {{ specific {{ versions: 2 }} }}
        max_batch_size: 1
        input {{ name: "x" data_type: TYPE_FP32 dims: -1 dims: 80 }}
        output {{ name: "encoder_out" data_type: TYPE_FP32 dims: -1 dims: -1 }}
        instance_group {{ count: 2 gpus: 0 gpus: 1 kind: KIND_GPU }}
        default_model_filename: "encoder.onnx"
        sequence_batching {{
          max_sequence_idle_microseconds: 5000000
          oldest {{ max_candidate_sequences: 1024 max_queue_delay_microseconds: 5000 }}
          state {_state("cached_att", "FP32", "16")}
        }}
        """,
        """(float[n,t,80] x, float[n,16] cached_att) => (float[n,t,k] encoder_out, float[n,16] r_cached_att)
        <float[1] more = {0.25}, int64[1] axis = {1}> {
          A = MatMul(x, weights) B = Unsqueeze(cached_att, axis) encoder_out = Add(A, B)
          r_cached_att = Add(cached_att, more)
        }""",
        DIFFERENT,
        CPU_FALLBACK,
        no_effect=("sequence_batching.oldest.max_candidate_sequences",),
        weights={"weights": (80, 16)},
        file="encoder.onnx",
        versions=(1, 2, 3),
        served=("2",),
    ),
    "sepsis_sentinel": Case(
        "a repository with a streaming model of vital signs",
        f"""
        platform: "onnxruntime_onnx" max_batch_size: 128
        version_policy: {{ all: {{}} }}
        # Enable sequence batching for streaming inference
        sequence_batching {{
          max_sequence_idle_microseconds: 5000000
          oldest: {{}}
          control_input [
            {_control("START", "START", "fp32_false_true: [ 0, 1 ]")},
            {_control("END", "END", "fp32_false_true: [ 0, 1 ]")},
            {_control("READY", "READY", "fp32_false_true: [ 0, 1 ]")},
            {_control("CORRID", "CORRID", "data_type: TYPE_UINT64")}
          ]
        }}
        {_input("vitals", "FP32", "8")} {_output("risk", "FP32", "1")}
        """,
        """(float[n,8] vitals, float[n,1] START, float[n,1] END, float[n,1] READY, uint64[n,1] CORRID)
        => (float[n,1] risk) {
          A = ReduceMean<axes = [1], keepdims = 1>(vitals) B = Add(A, START) C = Sub(B, END) D = Cast<to = 1>(CORRID)
          E = Mul(C, READY) risk = Add(E, D)
        }""",
        versions=(1, 4),
        served=("1", "4"),
    ),
    "bert": Case(
        "a repository with a BERT classifier",
        f"""
        platform: "onnxruntime_onnx"
        version_policy: {{all{{}}}}
        max_batch_size: 192
        dynamic_batching {{
          preferred_batch_size: [ 1,2,4,8,16,32,64,128,192] max_queue_delay_microseconds: 30000
        }}
        {_input("input_ids", "INT64", "512")} {_input("input_mask", "INT64", "512")}
        {_input("token_type_ids", "INT64", "512")} {_output("output", "FP32", "112")}
        """,
        """(int64[n,512] input_ids, int64[n,512] input_mask, int64[n,512] token_type_ids) => (float[n,112] output) {
          A = Mul(input_ids, input_mask) B = Add(A, token_type_ids) C = Cast<to = 1>(B) output = MatMul(C, weights)
        }""",
        weights={"weights": (512, 112)},
        versions=(1, 2),
        served=("1", "2"),
    ),
    "base_model_cpu": Case(
        "a repository with a model for questions about images",
        f"""
        platform: "onnxruntime_onnx" max_batch_size: 8
        {_input("pixel_values", "FP32", "3, 384, 384")} {_input("input_ids", "INT64", "-1")}
        {_input("attention_mask", "INT64", "-1")} {_output("logits", "FP32", "-1, 30524")}
        instance_group [ {{ kind: KIND_CPU }} ]
        dynamic_batching {{ preferred_batch_size: [ 1, 2, 4, 8 ] max_queue_delay_microseconds: 1000 }}
        """,
        """(float[n,3,384,384] pixel_values, int64[n,s] input_ids, int64[n,s] attention_mask)
        => (float[n,s,30524] logits)
        <int64[1] last = {2}> {
          A = ReduceMean<axes = [3], keepdims = 0>(pixel_values) B = ReduceMean<axes = [1, 2], keepdims = 1>(A)
          C = Cast<to = 1>(attention_mask) D = Unsqueeze(C, last) E = Gather(weights, input_ids)
          F = Mul(E, D) logits = Add(F, B)
        }""",
        weights={"weights": (10, 30524)},
    ),
    "chest_gpu": Case(
        "a repository with a classifier of X-rays",
        """
backend: "onnxruntime"
max_batch_size: 1024
input [
  {
    name: "input"  # has to match ONNX model's input name
    data_type: TYPE_FP32
    dims: [3, 224, 224]
  }
]
output [
  {
    name: "output"
    data_type: TYPE_FP32  # output is a list of probabilities
    dims: [3]  #\N{SPACE}
  }
]
  instance_group [
    {
      count: 1
      kind: KIND_GPU
      gpus: [ 0 ]
    }
]
dynamic_batching {
  preferred_batch_size: [16, 64, 256]
  max_queue_delay_microseconds: 1000
}""",
        """(float[n,3,224,224] input) => (float[n,3] output) {
          A = ReduceMean<axes = [2, 3], keepdims = 0>(input) output = MatMul(A, weights)
        }""",
        DIFFERENT,
        CPU_FALLBACK,
        weights={"weights": (3, 3)},
    ),
    "clip_image_encoder": Case(
        "a repository with CLIP",
        'platform: "onnxruntime_onnx"  # Declares it as an ONNX model\nmax_batch_size: 32\n'
        + _input("pixel_values", "FP32", "3, 224, 224")
        + _output("image_embeds", "FP32", "512")
        + "dynamic_batching { max_queue_delay_microseconds: 5000 }",
        # Exported with an output more, which the configuration leaves out.
        """(float[n,3,h,w] pixel_values) => (float[n,512] image_embeds, float[3] statistics) {
          A = ReduceMean<axes = [2, 3], keepdims = 0>(pixel_values) image_embeds = MatMul(A, weights)
          statistics = ReduceMean<axes = [0], keepdims = 0>(A)
        }""",
        weights={"weights": (3, 512)},
        why="outputs that the configuration leaves out are not offered; sizes that it fixes are checked",
    ),
    "yolo": Case(
        "a repository with YOLOv8",
        """
        platform: "onnxruntime_onnx"
        max_batch_size: 0
        input [ {
            name: "images", # as exported
            data_type: TYPE_FP32
            dims: [ 1,3,640,640 ]
        } ]
        output[ { name: "output0", data_type: TYPE_FP32 dims: [ 1,84,8400 ] } ]
        version_policy: { latest { num_versions: 1 } }
        """,
        """(float[1,3,640,640] images) => (float[1,84,8400] output0) {
          A = ReduceMean<axes = [3], keepdims = 0>(images) B = ReduceMean<axes = [1, 2], keepdims = 1>(A)
          output0 = Mul(B, weights)
        }""",
        weights={"weights": (84, 8400)},
        versions=(1, 3),
        served=("3",),
    ),
    "yolo_trt": Case(
        "Ultralytics' guide to Triton",
        """
        optimization { execution_accelerators { gpu_execution_accelerator {
          name: "tensorrt"
          parameters { key: "precision_mode" value: "FP16" }
          parameters { key: "max_workspace_size_bytes" value: "3221225472" }
          parameters { key: "trt_engine_cache_enable" value: "1" }
          parameters { key: "trt_engine_cache_path" value: "/models/yolo/1" }
        } } }
        parameters { key: "metadata" value: { string_value: "{'task': 'detect'}" } }
        """,
        """(float[1,3,64,64] images) => (float[1,3,1,1] output0) { output0 = GlobalAveragePool(images) }""",
        DIFFERENT,
        "engines of TensorRT are kept in the worker's state, not in `trt_engine_cache_path`",
        no_effect=(
            "parameters.metadata",
            "optimization.execution_accelerators.gpu_execution_accelerator.parameters.trt_engine_cache_path",
        ),
    ),
    "yolov5s_face_detector": Case(
        "a repository with a detector of faces",
        """
        platform: "onnxruntime_onnx"
        max_batch_size: 1
        input [ { name: "images" data_type: TYPE_FP32 dims: [3, -1 , -1] } ]
        output [
          { name: "stride_8" data_type: TYPE_FP32 dims: [-1, -1, -1, -1] },
          { name: "stride_16" data_type: TYPE_FP32 dims: [-1, -1, -1, -1] }
        ]
        optimization { execution_accelerators {
          gpu_execution_accelerator : [ {
            name : "tensorrt"
            parameters { key: "precision_mode" value: "FP16" }
            parameters { key: "max_workspace_size_bytes" value: "1073741824" }
            }]
        }}
        """,
        """(float[n,3,h,w] images) => (float[n,a,b,c,d] stride_8, float[n,a,b,c,d] stride_16) <int64[1] last = {4}> {
          A = Unsqueeze(images, last) stride_8 = Abs(A) stride_16 = Neg(A)
        }""",
    ),
    "yolov8n 检测+v1.0 @640": Case(
        "folders of models with blanks, signs and other letters",
        'platform: "onnxruntime_onnx" max_batch_size: 0\n'
        + _input("images/été:0", "UINT8", "4, 4, 3", "format: FORMAT_NHWC")
        + _output("boxes (x, y)", "UINT8", "4, 4, 3"),
        '(uint8[4,4,3] "images/été:0") => (uint8[4,4,3] "boxes (x, y)") { "boxes (x, y)" = Identity("images/été:0") }',
    ),
    "whisper": Case(
        "a repository with Whisper",
        """
        platform: "onnxruntime_onnx"
        max_batch_size: 8
        input [ { name: "audio_features" data_type: TYPE_FP32 dims: [ -1, 80, -1 ]  # [batch, features, length]
        } ]
        output [ { name: "output_ids" data_type: TYPE_INT64 dims: [ -1, -1 ] } ]
        """,
        "(float[n,80,t] audio_features) => (int64[n,80,t] output_ids) { output_ids = Cast<to = 7>(audio_features) }",
        refused=["gives 'audio_features' dims [-1, 80, -1]", "they should be [80, -1]"],
    ),
    "text_pipeline": Case(
        "a laboratory with densenet",
        'platform: "onnxruntime_onnx" max_batch_size: 16\n'
        + _input("data_0", "FP32", "3, 224, 224")
        + _output("fc6_1", "FP32", "1000, 1, 1")
        + "dynamic_batching { preferred_batch_size: [ 4, 8, 16 ] max_queue_delay_microseconds: 5000 }",
        """(float[1,3,224,224] data_0) => (float[1,1000,1,1] fc6_1) {
          A = GlobalAveragePool(data_0) fc6_1 = Conv(A, weights)
        }""",
        refused=["max_batch_size is 16, but the first dimension of 'data_0' is not free"],
        weights={"weights": (1000, 3, 1, 1)},
    ),
    "llm_model": Case(
        "a repository with a language model",
        'platform: "onnxruntime_onnx" max_batch_size: 8\n'
        + _input("input_ids", "INT64", "-1, 512")
        + "optimization { enable_pinned_input: true enable_pinned_output: true eager_batching: true }",
        _same("int64[n,s,512]", "input_ids", "logits"),
        refused=['ModelOptimizationPolicy" has no field named "enable_pinned_input"'],
    ),
    "copied": Case(
        "a folder that was copied with its configuration",
        'name: "text_recognition" backend: "onnxruntime" max_batch_size : 8\n' + _RECOGNITION,
        _LETTERS,
        refused=["name is 'text_recognition', but the folder is 'copied'"],
        weights=_OF_LETTERS,
    ),
    "resnet50": Case(
        "triton-inference-server/tutorials, Quick_Deploy/PyTorch",
        'platform: "pytorch_libtorch" max_batch_size : 0\n'
        + _input("input__0", "FP32", "3, 224, 224", "reshape { shape: [ 1, 3, 224, 224 ] }")
        + _output("output__0", "FP32", "1, 1000 ,1, 1", "reshape { shape: [ 1, 1000 ] }"),
        _same("float[1,3,224,224]", "input__0", "output__0"),
        NOT_SERVED,
        "backends other than ONNX Runtime; export the model",
        ["platform is 'pytorch_libtorch'; Ringmesh serves onnxruntime_onnx and ensemble"],
    ),
    "onnx_shape_tensor": Case(
        f"{_OF_DOCS}/model_configuration.md",
        'platform: "onnxruntime_onnx" max_batch_size: 0\n'
        + _input("INPUT0", "INT32", "2", "is_shape_tensor: true")
        + _output("OUTPUT0", "INT32", "2"),
        _same("int32[2]"),
        refused=["input 'INPUT0' has is_shape_tensor"],
    ),
}


def _values(case: Case, name: str, shape: tuple[int, ...]) -> onnx.TensorProto:
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(case.dtype)
    return numpy_helper.from_array(values, name)


def build(repository: Path) -> Path:
    """All of them; the repository."""
    for name, case in CASES.items():
        folder = repository / name
        for path, data in {"config.pbtxt": case.config.encode(), **case.files}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        for version in case.versions:
            file = folder / str(version) / case.file
            file.parent.mkdir(parents=True, exist_ok=True)
            if case.graph:
                graph = parser.parse_graph(f'"model" {case.graph}')
                graph.initializer.extend(_values(case, each, shape) for each, shape in case.weights.items())
                model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
                onnx.save(model, file)
    return repository
