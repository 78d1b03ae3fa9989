"""Decides which runs are made on the thread that received the request, even the event loop's: docs/decisions/0025.

Two conditions must hold. The graph proves that the time of a run depends only on the shapes of its inputs, never on
their values (`verdict`). And earlier runs with such shapes were quick (`InlineRuns`).
"""

from __future__ import annotations  # compiled by mypyc

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx

from services.inference.codec.request import Decoded
from services.inference.execution.graph import ELEMENTWISE, name_of, names, operator_types
from services.runtime.verdict import YES, Verdict

# The longest run that is made inline. For such runs another thread would cost more than it saves.
QUICK_NS = 500_000
# Encoding takes 0.1 to 0.6 ms per megabyte, depending on whether its pages are new. Inputs are not copied one by one.
MOST_BYTES_IN, MOST_BYTES_OUT = 4 << 20, 1 << 20
# The slowest run counts, of up to this many current runs and the same number before them.
_WINDOW = 32
_MAX_KINDS = 1024

_RNNS = frozenset({"GRU", "LSTM", "RNN"})


# The work of these operators, and the sizes of their outputs, follow from the shapes of their inputs.
_BY_SHAPE = names(
    """
    ArgMax ArgMin Attention AveragePool BatchNormalization BitCast CastLike Concat Constant Conv ConvInteger
    ConvTranspose CumSum DepthToSpace DequantizeLinear Det Dropout DynamicQuantizeLinear Einsum EyeLike Flatten
    Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization Hardmax
    InstanceNormalization LRN LayerNormalization LogSoftmax LpNormalization LpPool MatMul MatMulInteger MaxPool
    MeanVarianceNormalization QLinearConv QLinearMatMul QuantizeLinear RMSNormalization RandomNormalLike
    RandomUniformLike ReverseSequence RotaryEmbedding ScatterElements ScatterND Shape Size Softmax SpaceToDepth
    Transpose Trilu
    ai.onnx.ml.ArrayFeatureExtractor ai.onnx.ml.Binarizer ai.onnx.ml.FeatureVectorizer ai.onnx.ml.Imputer
    ai.onnx.ml.LinearClassifier ai.onnx.ml.LinearRegressor ai.onnx.ml.Normalizer ai.onnx.ml.SVMClassifier
    ai.onnx.ml.SVMRegressor ai.onnx.ml.Scaler ai.onnx.ml.TreeEnsemble ai.onnx.ml.TreeEnsembleClassifier
    ai.onnx.ml.TreeEnsembleRegressor
    com.microsoft.Attention com.microsoft.BiasGelu com.microsoft.DynamicQuantizeMatMul com.microsoft.FastGelu
    com.microsoft.FusedConv com.microsoft.FusedGemm com.microsoft.FusedMatMul com.microsoft.Gelu
    com.microsoft.MatMulIntegerToFloat com.microsoft.MatMulNBits com.microsoft.QAttention com.microsoft.QGemm
    com.microsoft.QLinearAdd com.microsoft.QLinearAveragePool com.microsoft.QLinearConcat
    com.microsoft.QLinearGlobalAveragePool com.microsoft.QLinearLeakyRelu com.microsoft.QLinearMul
    com.microsoft.QLinearSigmoid com.microsoft.QLinearSoftmax com.microsoft.QuickGelu
    com.microsoft.SkipLayerNormalization
    """
).union(ELEMENTWISE)
# The same holds for these if the inputs from this position on (sizes, axes, lengths) are known before the request.
_BY_SIZE = {
    **dict.fromkeys(("ConstantOfShape", "Range"), 0),
    **dict.fromkeys(
        names(
            """
        Expand OneHot Pad ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
        ReduceSum ReduceSumSquare Reshape Resize Slice Split Squeeze Tile TopK Unsqueeze Upsample
        """
        ),
        1,
    ),
    **dict.fromkeys(_RNNS, 4),
}
_SHAPES_OF = frozenset({"Shape", "Size"})


def verdict(model: onnx.ModelProto) -> Verdict:
    """Whether the time of a run follows from the shapes of its inputs."""
    unknown = operator_types(model).difference(_BY_SHAPE, _BY_SIZE)
    if unknown:
        return Verdict(f"what a run takes may depend on values: its graph holds {', '.join(sorted(unknown))}")
    inputs = {value.name for value in model.graph.input}
    # A request may override initializers that are also inputs.
    known = {tensor.name for tensor in model.graph.initializer if tensor.name not in inputs}
    for node in model.graph.node:
        operator = name_of(node)
        first = _BY_SIZE.get(operator)
        # For a recurrent layer only the fifth input counts. The inputs after it are states.
        sizes = () if first is None else node.input[first : first + 1 if operator in _RNNS else None]
        if computed := [name for name in sizes if name and name not in known]:
            return Verdict(f"sizes depend on values: {computed[0]!r} of {operator} is computed from them")
        if operator in _SHAPES_OF or _is_known(operator, node.input, known):
            known.update(node.output)
    return YES


def _is_known(operator: str, inputs: Iterable[str], known: set[str]) -> bool:
    return not operator.startswith("Random") and all(name in known for name in inputs if name)


class InlineRuns:
    """The times of the slowest recent runs of one model, by the shapes of their inputs. May be used from any thread.

    `batchable`: rows are independent, so the time of a run grows at most in proportion to its rows. `by_cpu`: CPU time
    bounds the time of a run, to ignore time in which another process had the core.
    """

    def __init__(self, *, batchable: bool, by_cpu: bool) -> None:
        self._batchable = batchable
        self._by_cpu = by_cpu
        self._kinds: dict[Hashable, _Slowest] = {}
        # Whether the last run was quick. For a slow model this avoids a closer look at most requests.
        self.is_quick = False

    def allows(self, first: Decoded, rows: int) -> bool:
        """Whether a run of `rows` rows may be made inline. `first` is one of its requests."""
        for bits in range(rows.bit_length(), -1, -1):
            slowest = self._kinds.get(self._kind(first, bits))
            if slowest is not None:
                return rows * slowest.ns <= QUICK_NS and rows * slowest.bytes <= MOST_BYTES_OUT
        return False

    def ran(self, first: Decoded, rows: int, wall_ns: int, cpu_ns: int, outputs: Sequence[npt.NDArray[Any]]) -> None:
        """Records a run that took `wall_ns`, of which the thread had the core for `cpu_ns`."""
        if not isinstance(first.signature, tuple):  # a request that cannot share a run has another kind of signature
            return
        ns = min(wall_ns, 2 * cpu_ns) if self._by_cpu else wall_ns
        kind = self._kind(first, rows.bit_length())
        slowest = self._kinds.get(kind)
        if slowest is None:
            if len(self._kinds) >= _MAX_KINDS:
                self._kinds.clear()
            slowest = self._kinds[kind] = _Slowest()
        slowest.add(ns / max(1, rows), sum([output.nbytes for output in outputs]) / max(1, rows))
        self.is_quick = ns <= QUICK_NS

    def _kind(self, first: Decoded, bits: int) -> Hashable:
        # The signature omits the first dimension. If rows are not independent, the time may depend on it, so whole
        # shapes are the key.
        return (first.signature, bits if self._batchable else _shapes(first.arrays))


class _Slowest:
    """The largest time and output bytes of a row, over two windows of runs."""

    def __init__(self) -> None:
        self._runs = 0
        self._now = self._before = (0.0, 0.0)
        self.ns = self.bytes = math.inf

    def add(self, ns: float, size: float) -> None:
        if self._runs == _WINDOW:
            self._before, self._now, self._runs = self._now, (0.0, 0.0), 0
        self._runs += 1
        self._now = (max(self._now[0], ns), max(self._now[1], size))
        self.ns, self.bytes = max(self._now[0], self._before[0]), max(self._now[1], self._before[1])


def _shapes(arrays: Mapping[str, npt.NDArray[Any]]) -> Hashable:
    return tuple([(name, array.shape) for name, array in arrays.items()])
