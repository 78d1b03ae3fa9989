"""Reads an ONNX file, without weights in other files, and lists its operators."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

_LFS_POINTER = b"version https://git-lfs"


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# `Sampling` and the last three are Microsoft's.
RANDOM_OPERATORS = names(
    """
    RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli
    Sampling BiasDropout BitmaskDropout BitmaskBiasDropout
    """
)
_TRAINING_MODE = 2  # the position of that input of Dropout
# Operators with which ONNX Runtime 1.32 ends the process if a tensor has no elements.
_ABORT_ON_EMPTY = names("GRU LSTM STFT Scan com.microsoft.DynamicQuantizeLSTM")


# Operators that compute each number from the numbers at the same place, with broadcasting.
ELEMENTWISE = names(
    """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast Ceil Celu Clip
    Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN
    LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink
    Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor
    """
)


def read(file: Path) -> onnx.ModelProto:
    """Reads a model; makes one copy of the weights in the file itself. Raises ValueError if it is not an ONNX model."""
    model = onnx.ModelProto()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            model.ParseFromString(view)  # type: ignore[arg-type]  # not copied into bytes first
        except DecodeError:
            if data[: len(_LFS_POINTER)] == _LFS_POINTER:
                raise ValueError(
                    "it is a pointer of Git LFS, not the model; `git lfs pull` fetches the model"
                ) from None
            raise ValueError("it is no ONNX model, or a truncated one") from None
        finally:
            view.release()
    # Protobuf does not check the text of proto2: it returns bytes if they are not UTF-8.
    if any(isinstance(text, bytes) for node in _nodes(model) for text in (node.op_type, node.domain)):
        raise ValueError("it is no ONNX model: the name of an operator is not UTF-8")
    return model


def unranked(model: onnx.ModelProto) -> frozenset[str]:
    return frozenset(
        value.name
        for value in (*model.graph.input, *model.graph.output)
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")
    )


def operator_types(model: onnx.ModelProto) -> frozenset[str]:
    """The names (`name_of`) of the operators of all nodes, including those in subgraphs and functions."""
    return frozenset(map(name_of, _nodes(model)))


def name_of(node: onnx.NodeProto) -> str:
    """The operator, prefixed by its domain unless that is ONNX's own: `com.microsoft.Gelu`."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def random_operators(model: onnx.ModelProto) -> list[str]:
    found = {node.op_type for node in _nodes(model) if node.op_type in RANDOM_OPERATORS}
    # The value of training_mode may be computed, so any given value counts. Needlessly not caching a model is safe.
    if any(node.op_type == "Dropout" and any(node.input[_TRAINING_MODE:]) for node in _nodes(model)):
        found.add("Dropout with training_mode")
    return sorted(found)


def aborting_operators(model: onnx.ModelProto) -> list[str]:
    """Those that end the process if a tensor has no elements."""
    return sorted({name_of(node) for node in _nodes(model) if _aborts_on_empty(node)})


def _aborts_on_empty(node: onnx.NodeProto) -> bool:
    given = {attribute.name: attribute for attribute in node.attribute}
    match name_of(node):
        case "ConvTranspose":  # in three dimensions only
            return "kernel_shape" in given and len(given["kernel_shape"].ints) == 3
        case "Unique":
            return "axis" in given
        case name:
            return name in _ABORT_ON_EMPTY


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    waiting: list[Iterable[onnx.NodeProto]] = [model.graph.node, *(function.node for function in model.functions)]
    while waiting:
        for node in waiting.pop():
            yield node
            for attribute in node.attribute:
                waiting.extend(graph.node for graph in (attribute.g, *attribute.graphs))
