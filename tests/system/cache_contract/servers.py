"""A v2 server under test, and how its models are laid out: the same models for each kind of server."""

import json
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from ringmesh.oip.v2 import grpc_service_pb2 as v2

INFER = "/inference.GRPCInferenceService/ModelInfer"
LOAD = "/inference.GRPCInferenceService/RepositoryModelLoad"
KINDS = ("ringmesh", "triton", "mlserver")
# Name, version and constant. All answer sum(a) - 2 sum(b) + constant, the shape of a, and a number that no run repeats.
MODELS = (
    ("contract_probe", 1, 0),
    ("contract_probe", 2, 2000),
    ("contract_other", 1, 1000),
    ("contract_replaced", 1, 0),
    ("contract_slow", 1, 0),
)
OUTPUTS = {"sum": "FP32", "shape": "INT64", "nonce": "FP64"}
_CONTENTS = {"FP32": "fp32_contents", "FP64": "fp64_contents", "INT64": "int64_contents", "BYTES": "bytes_contents"}
_DTYPES = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64}


class NotOfferedError(Exception):
    """The server does not have what the case asks about."""


@dataclass(frozen=True)
class Answer:
    """`sum` and the others by name: lists of numbers, or of bytes."""

    id: str
    outputs: dict
    datatypes: dict

    @property
    def nonce(self):
        return self.outputs["nonce"]


@dataclass(frozen=True)
class Server:
    """`folder` is where its models lie, `kind` how."""

    channel: grpc.Channel
    kind: str
    folder: Path

    def infer(self, request: v2.ModelInferRequest | bytes, **metadata: str) -> Answer:
        """Raises grpc.RpcError."""
        body = request if isinstance(request, bytes) else request.SerializeToString()
        response = self.channel.unary_unary(INFER)(body, timeout=60, metadata=tuple(metadata.items()))
        return read(v2.ModelInferResponse.FromString(response))

    def start(self, request: v2.ModelInferRequest) -> grpc.Future:
        return self.channel.unary_unary(INFER, response_deserializer=v2.ModelInferResponse.FromString).future(
            request.SerializeToString(), timeout=60
        )

    def replace(self, name: str, constant: int) -> None:
        """Other files under the same name and version, loaded."""
        lay_out(self.folder, self.kind, [(name, 1, constant)])
        request = v2.RepositoryModelLoadRequest(model_name=name)
        self.channel.unary_unary(LOAD)(request.SerializeToString(), timeout=60)


def read(response: v2.ModelInferResponse) -> Answer:
    outputs, datatypes = {}, {}
    for index, output in enumerate(response.outputs):
        datatypes[output.name] = output.datatype
        if not response.raw_output_contents:
            outputs[output.name] = [*getattr(output.contents, _CONTENTS[output.datatype])]
        elif output.datatype == "BYTES":
            outputs[output.name] = [response.raw_output_contents[index][4:]]
        else:
            raw = response.raw_output_contents[index]
            outputs[output.name] = np.frombuffer(raw, _DTYPES[output.datatype]).tolist()
    return Answer(response.id, outputs, datatypes)


def values(count: int) -> list[float]:
    """Whole numbers nobody has sent before: sums of them are exact."""
    return [float(random.randrange(1 << 16)) for _ in range(count)]


def question(
    a: Iterable[float],
    b: Iterable[float],
    *,
    shape=(2, 8),
    model="contract_probe",
    typed=False,
    swapped=False,
    **fields,
) -> v2.ModelInferRequest:
    request = v2.ModelInferRequest(model_name=model, model_version="1", **fields)
    for name, numbers in (("b", b), ("a", a)) if swapped else (("a", a), ("b", b)):
        tensor = request.inputs.add(name=name, datatype="FP32", shape=shape)
        if typed:
            tensor.contents.fp32_contents.extend(numbers)
        else:
            request.raw_input_contents.append(np.array(numbers, np.float32).tobytes())
    return request


def lay_out(folder: Path, kind: str, models: Iterable[tuple[str, int, int]] = MODELS) -> None:
    """Writes the models, with the cache on for each, as a server of `kind` reads them."""
    for name, version, constant in models:
        {"ringmesh": _lay_out_onnx, "triton": _lay_out_triton, "mlserver": _lay_out_mlserver}[kind](
            folder, name, version, constant
        )


def _lay_out_onnx(folder: Path, name: str, version: int, constant: int) -> None:
    def made(kind, output, *shape):
        return helper.make_tensor_value_info(output, kind, shape)

    nodes = [
        helper.make_node("ReduceSum", ["a"], ["a_sum"], keepdims=0),
        helper.make_node("ReduceSum", ["b"], ["b_sum"], keepdims=0),
        helper.make_node("Mul", ["b_sum", "two"], ["b_twice"]),
        helper.make_node("Sub", ["a_sum", "b_twice"], ["difference"]),
        helper.make_node("Add", ["difference", "constant"], ["whole"]),
        helper.make_node("Reshape", ["whole", "one"], ["sum"]),
        helper.make_node("Shape", ["a"], ["shape"]),
        helper.make_node("RandomUniform", [], ["nonce"], shape=[1], dtype=TensorProto.DOUBLE),
    ]
    if name == "contract_slow":
        side = 512
        weights = np.full((side, side), 1 / side, np.float32)
        turn = helper.make_graph(
            [
                helper.make_node("MatMul", ["m", "weights"], ["m_out"]),
                helper.make_node("Identity", ["go"], ["go_out"]),
            ],
            "turn",
            [made(TensorProto.INT64, "i"), made(TensorProto.BOOL, "go"), made(TensorProto.FLOAT, "m", side, side)],
            [made(TensorProto.BOOL, "go_out"), made(TensorProto.FLOAT, "m_out", side, side)],
        )
        nodes[4:5] = [
            helper.make_node("Loop", ["turns", "true", "weights"], ["m_end"], body=turn),
            helper.make_node("ReduceMax", ["m_end"], ["most"], keepdims=0),
            helper.make_node("Mul", ["most", "constant"], ["nothing"]),
            helper.make_node("Add", ["difference", "nothing"], ["whole"]),
        ]
        more = [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.array(100, np.int64), "turns"),
            numpy_helper.from_array(np.array(True), "true"),
        ]
    else:
        more = []
    graph = helper.make_graph(
        nodes,
        name,
        [made(TensorProto.FLOAT, "a", "n", "m"), made(TensorProto.FLOAT, "b", "n", "m")],
        [made(TensorProto.FLOAT, "sum", 1), made(TensorProto.INT64, "shape", 2), made(TensorProto.DOUBLE, "nonce", 1)],
        [
            numpy_helper.from_array(np.array(2, np.float32), "two"),
            numpy_helper.from_array(np.array(constant, np.float32), "constant"),
            numpy_helper.from_array(np.array([1], np.int64), "one"),
            *more,
        ],
    )
    place = folder / name / str(version)
    place.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, place / "model.onnx")
    # Its answers are not the same twice, which is how a hit shows: so caching them has to be asked for.
    config = "max_batch_size: 0 response_cache { enable: true } version_policy { all {} }"
    (folder / name / "config.pbtxt").write_text(config)


_TRITON_MODEL = """
import random, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            a, b = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in "ab")
            time.sleep({seconds})
            made = {{
                "sum": np.array([a.sum() - 2 * b.sum() + {constant}], np.float32),
                "shape": np.array(a.shape, np.int64),
                "nonce": np.array([random.random()]),
            }}
            tensors = [pb_utils.Tensor(name, made[name]) for name in request.requested_output_names()]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
"""


def _lay_out_triton(folder: Path, name: str, version: int, constant: int) -> None:
    place = folder / name / str(version)
    place.mkdir(parents=True, exist_ok=True)
    seconds = 0.5 if name == "contract_slow" else 0
    (place / "model.py").write_text(_TRITON_MODEL.format(constant=constant, seconds=seconds))
    (folder / name / "config.pbtxt").write_text(
        'backend: "python" max_batch_size: 0 response_cache { enable: true } version_policy { all {} } '
        + " ".join(f'input {{ name: "{name}" data_type: TYPE_FP32 dims: [-1, -1] }}' for name in "ab")
        + 'output { name: "sum" data_type: TYPE_FP32 dims: [1] }'
        + 'output { name: "shape" data_type: TYPE_INT64 dims: [2] }'
        + 'output { name: "nonce" data_type: TYPE_FP64 dims: [1] }'
    )


_MLSERVER_RUNTIME = """
import asyncio, random
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

class Probe(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        given = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        more = self.settings.parameters.extra
        await asyncio.sleep(more["seconds"])
        made = {
            "sum": np.array([given["a"].sum() - 2 * given["b"].sum() + more["constant"]], np.float32),
            "shape": np.array(given["a"].shape, np.int64),
            "nonce": np.array([random.random()]),
        }
        wanted = [output.name for output in payload.outputs or []] or list(made)
        outputs = [NumpyCodec.encode_output(name, made[name]) for name in wanted]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)
"""


def _lay_out_mlserver(folder: Path, name: str, version: int, constant: int) -> None:
    place = folder / name / str(version)
    place.mkdir(parents=True, exist_ok=True)
    (place / "contract_runtime.py").write_text(_MLSERVER_RUNTIME)
    tensors = [{"name": name, "datatype": "FP32", "shape": [-1, -1]} for name in "ab"]
    seconds = 0.5 if name == "contract_slow" else 0
    (place / "model-settings.json").write_text(
        json.dumps(
            {
                "name": name,
                "implementation": "contract_runtime.Probe",
                "inputs": tensors,
                "cache_enabled": True,
                "parameters": {"version": str(version), "extra": {"constant": constant, "seconds": seconds}},
            }
        )
    )
    (folder / "settings.json").write_text(
        json.dumps({"cache_enabled": True, "cache_size": 1000, "parallel_workers": 0, "http_port": 0})
    )


def clear(folder: Path) -> None:
    """Nothing of an earlier run is left: what a case replaced would be loaded at once."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
