"""Triton's example repository in models of our own: the same names, tensors and configurations.

Of docs/examples/model_repository of triton-inference-server/server. The graphs compute what those of the examples do;
densenet_onnx and inception_onnx, which are downloaded there, stand here for their shapes, with few weights.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

CLASSES = {"densenet_onnx": 1000, "inception_onnx": 1001}

_SUM = """
    A = Cast<to = 6>(INPUT0)
    B = Cast<to = 6>(INPUT1)
    C = Add(A, B)
    D = Sub(A, B)
"""
_GRAPHS = {
    "simple": f"""
        (int32[n,16] INPUT0, int32[n,16] INPUT1) => (int32[n,16] OUTPUT0, int32[n,16] OUTPUT1) {{
          {_SUM} OUTPUT0 = Identity(C) OUTPUT1 = Identity(D)
        }}""",
    "simple_int8": f"""
        (int8[n,16] INPUT0, int8[n,16] INPUT1) => (int8[n,16] OUTPUT0, int8[n,16] OUTPUT1) {{
          {_SUM} OUTPUT0 = Cast<to = 3>(C) OUTPUT1 = Cast<to = 3>(D)
        }}""",
    "simple_string": f"""
        (string[n,16] INPUT0, string[n,16] INPUT1) => (string[n,16] OUTPUT0, string[n,16] OUTPUT1) {{
          {_SUM} OUTPUT0 = Cast<to = 8>(C) OUTPUT1 = Cast<to = 8>(D)
        }}""",
    "simple_identity": "(string[n,m] INPUT0) => (string[n,m] OUTPUT0) { OUTPUT0 = Identity(INPUT0) }",
    "simple_sequence": """
        (int32[n,1] INPUT, int32[n,1] START, int32[n,1] READY) => (int32[n,1] OUTPUT) {
          A = Add(INPUT, START) OUTPUT = Mul(READY, A)
        }""",
    "simple_dyna_sequence": """
        (int32[n,1] INPUT, int32[n,1] START, int32[n,1] END, int32[n,1] READY, uint64[n,1] CORRID)
        => (int32[n,1] OUTPUT) {
          ID = Cast<to = 6>(CORRID) A = Add(INPUT, START) B = Mul(END, ID) C = Add(A, B) OUTPUT = Mul(READY, C)
        }""",
    "densenet_onnx": """
        (float[1,3,224,224] data_0) => (float[1,1000,1,1] fc6_1) {
          A = GlobalAveragePool(data_0) fc6_1 = Conv(A, weights)
        }""",
    "inception_onnx": """
        (float[n,299,299,3] "input:0") => (float[n,1001] "InceptionV3/Predictions/Softmax:0") {
          A = ReduceMean<keepdims = 0>("input:0", axes)
          B = MatMul(A, weights)
          "InceptionV3/Predictions/Softmax:0" = Softmax(B)
        }""",
}


def _pair(kind: str) -> str:
    return "max_batch_size: 8\n" + "".join(
        f"{field} {{ name: '{field.upper()}{number}' data_type: {kind} dims: [ 16 ] }}"
        for field in ("input", "output")
        for number in (0, 1)
    )


def _control(name: str, kind: str, values: str = "int32_false_true: [ 0, 1 ]") -> str:
    return f"control_input {{ name: '{name}' control {{ kind: CONTROL_SEQUENCE_{kind} {values} }} }}"


_ONE = """
    max_batch_size: 8
    input { name: "INPUT" data_type: TYPE_INT32 dims: [ 1 ] }
    output { name: "OUTPUT" data_type: TYPE_INT32 dims: [ 1 ] }
"""
_START, _READY = _control("START", "START"), _control("READY", "READY")
CONFIGS = {
    "simple": _pair("TYPE_INT32"),
    "simple_int8": _pair("TYPE_INT8"),
    "simple_string": _pair("TYPE_STRING"),
    # Of the Python backend there.
    "simple_identity": """
        max_batch_size: 8
        input { name: "INPUT0" data_type: TYPE_STRING dims: [ -1 ] }
        output { name: "OUTPUT0" data_type: TYPE_STRING dims: [ -1 ] }
    """,
    "simple_sequence": f"{_ONE} sequence_batching {{ {_START} {_READY} }} instance_group {{ kind: KIND_CPU }}",
    "simple_dyna_sequence": f"""
        {_ONE}
        sequence_batching {{
          max_sequence_idle_microseconds: 10000000
          oldest {{ max_candidate_sequences: 1024 max_queue_delay_microseconds: 10000 }}
          {_START} {_control("END", "END")} {_READY} {_control("CORRID", "CORRID", "data_type: TYPE_UINT64")}
        }}
        parameters {{ key: "execute_delay_ms" value {{ string_value: "3" }} }}
        instance_group {{ count: 2 kind: KIND_CPU }}
    """,
    "densenet_onnx": """
        max_batch_size: 0
        input {
          name: "data_0" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 3, 224, 224 ]
          reshape { shape: [ 1, 3, 224, 224 ] }
        }
        output {
          name: "fc6_1" data_type: TYPE_FP32 dims: [ 1000 ] reshape { shape: [ 1, 1000, 1, 1 ] }
          label_filename: "densenet_labels.txt"
        }
    """,
    "inception_onnx": """
        max_batch_size: 0
        input {
          name: "input:0" data_type: TYPE_FP32 format: FORMAT_NHWC dims: [ 299, 299, 3 ]
          reshape { shape: [ 1, 299, 299, 3 ] }
        }
        output {
          name: "InceptionV3/Predictions/Softmax:0" data_type: TYPE_FP32 dims: [ 1001 ] reshape { shape: [ 1, 1001 ] }
          label_filename: "inception_labels.txt"
        }
    """,
    # As an ensemble that ensemble_image_client calls: it takes an image and answers classes.
    "image_ensemble": """
        input { name: "IMAGE" data_type: TYPE_FP32 dims: [ 3, 224, 224 ] }
        output { name: "CLASSES" data_type: TYPE_FP32 dims: [ 1000 ] }
        ensemble_scheduling {
          step {
            model_name: "densenet_onnx" model_version: -1
            input_map { key: "data_0" value: "IMAGE" } output_map { key: "fc6_1" value: "CLASSES" }
          }
        }
    """,
}


def label(index: int) -> str:
    """Of a class, in both label files."""
    return f"CLASS {index}"


def _weights(*shape: int) -> onnx.TensorProto:
    values = np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(values, "weights")


_INITIALIZERS = {
    "densenet_onnx": [_weights(1000, 3, 1, 1)],
    "inception_onnx": [_weights(3, 1001), numpy_helper.from_array(np.array([1, 2]), "axes")],
}


def build(repository: Path) -> Path:
    """All of them, each with its version 1; the repository."""
    for name, config in CONFIGS.items():
        folder = repository / name
        (folder / "1").mkdir(parents=True)
        platform = "onnxruntime_onnx" if name in _GRAPHS else "ensemble"
        (folder / "config.pbtxt").write_text(f'name: "{name}"\nplatform: "{platform}"\n{config}')
        if name in _GRAPHS:
            graph = parser.parse_graph(f'"{name}" {_GRAPHS[name]}')
            graph.initializer.extend(_INITIALIZERS.get(name, ()))
            model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
            onnx.save(model, folder / "1/model.onnx")
        if name in CLASSES:
            labels = "".join(f"{label(index)}\n" for index in range(CLASSES[name]))
            (folder / f"{name.partition('_')[0]}_labels.txt").write_text(labels)
    return repository
