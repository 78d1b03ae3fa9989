"""What is proven, and what is not and why."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from services.inference.execution.batch_proof import prover
from services.inference.execution.batch_proof.prover import prove
from tests.random_graphs import same, session

ML, MICROSOFT = "ai.onnx.ml", "com.microsoft"


def model(text, opset=17, functions=""):
    """`text`: inputs, outputs and nodes in ONNX's own notation; constants without a value are ones."""
    head = f'<ir_version: 9, opset_import: ["": {opset}, "{ML}": 3, "{MICROSOFT}": 1, "local": 1]>'
    made = parser.parse_model(f"{head} g {text} {functions}")
    for one in made.graph.value_info:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(one.type.tensor_type.elem_type))
        shape = [dim.dim_value for dim in one.type.tensor_type.shape.dim]
        words = np.full(shape, b"a", object)
        array = np.ones(shape, dtype) if dtype.kind != "O" else words
        made.graph.initializer.append(numpy_helper.from_array(array, one.name))
    del made.graph.value_info[:]
    return made


X = "(float[N, 4] x) => (float[N, 4] y)"
CUBE = "(float[N, 3, 4] x) => (float[N, 3, 4] y)"
WORDS = "(int64[N, S] x) => (float[N, S, 4] y)"

# What makes answers depend on other rows: the graph, its opset, and what the reason says.
TRAPS = {
    "a reduction over all axes by default": (f"{X} {{ m = ReduceMax(x) y = Div(x, m) }}", 17, "(ReduceMax): it reduces axis 0"),
    "a reduction with empty axes": (f"{X} <int64[0] a> {{ m = ReduceSum(x, a) y = Div(x, m) }}", 17, "(ReduceSum): it reduces axis 0"),
    "a reduction over axis -2": (f"{X} {{ m = ReduceMean<axes=[-2]>(x) y = Sub(x, m) }}", 17, "reduces axis 0"),
    "a reduction over computed axes": (
        "(float[N, 4] x) => (float[N, 4] y) { i = ArgMax<axis=1, keepdims=0>(x) m = ReduceSum(x, i) y = Sub(x, m) }", 17, "(ReduceSum): input 1 depends on the rows"),
    "ArgMax along its default axis": ("(float[N, 4] x) => (int64[1, 4] y) { y = ArgMax(x) }", 17, "(ArgMax): it searches axis 0"),
    "Softmax over all of a vector": ("(float[N] x) => (float[N] y) { y = Softmax(x) }", 17, "(Softmax): it normalises over axis 0"),
    "Softmax before opset 13 over later axes": (
        "(float[N, 4] x) => (float[N, 4] y) { t = Transpose<perm=[1, 0]>(x) s = Softmax<axis=0>(t) y = Transpose<perm=[1, 0]>(s) }", 12, "normalises over axis 1"),
    "MeanVarianceNormalization": (
        "(float[N, 2, 3, 3] x) => (float[N, 2, 3, 3] y) { y = MeanVarianceNormalization(x) }", 13, "normalises over axis 0"),
    "LayerNormalization from axis 0": (f"{X} <float[4] s> {{ y = LayerNormalization<axis=0>(x, s) }}", 17, "normalises over axis 0"),
    "BatchNormalization in training mode": (
        f"{CUBE} <float[3] s> {{ y, m, v = BatchNormalization<training_mode=1>(x, s, s, s, s) }}", 17, "in training mode"),
    "DynamicQuantizeLinear": (f"{X} {{ q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z) }}", 17, "(DynamicQuantizeLinear): its scale is computed over all rows"),
    "DynamicQuantizeMatMul": (
        f"{X} <int8[4, 4] w, float s> {{ y = {MICROSOFT}.DynamicQuantizeMatMul(x, w, s) }}", 17, "(DynamicQuantizeMatMul): its scale is computed over all rows"),
    "DynamicQuantizeLSTM": (
        f"(float[N, 3, 4] x) => (float[N, 1, 3, 2] y) <float[1, 4, 8] w, float[1, 2, 8] r> {{ y = {MICROSOFT}.DynamicQuantizeLSTM<hidden_size=2>(x, w, r) }}", 17, "over all rows"),
    "Gather of a row": (f"{X} <int64[1] i = {{0}}> {{ r = Gather(x, i) y = Add(x, r) }}", 17, "(Gather): it selects along axis 0"),
    "Gather of rows by rows": (f"{X} {{ i = ArgMax<axis=1, keepdims=0>(x) y = Gather(x, i) }}", 17, "selects along axis 0"),
    "Gather of features by rows": (f"{X} {{ i = ArgMax<axis=1, keepdims=0>(x) y = Gather<axis=1>(x, i) }}", 17, "by the indices of all rows"),
    "GatherND of rows": ("(float[N, 4] x, int64[N, 1] i) => (float[N, 4] y) { y = GatherND(x, i) }", 17, "selects along axis 0"),
    "GatherND whose index is made of rows": ("(int64[N] i) => (float[1] y) <float[9] t> { j = Unsqueeze(i, axes) y = GatherND(t, j) }".replace("<", "<int64[1] axes = {0}, "), 17, "the length of its indices is not known"),
    "GatherND in steps that do not fit": ("(int64[N] i) => (float[3, N] y) <float[3, 3] t, int64[2, 1] c = {0, 1}> { j = Gather<axis=1>(c, i) y = GatherND<batch_dims=1>(t, j) }", 17, "(GatherND)"),
    "GatherElements along the rows": ("(float[N, 4] x, int64[N, 4] i) => (float[N, 4] y) { y = GatherElements(x, i) }", 17, "selects along axis 0"),
    "GatherElements from a table as long as the batch": ("(int64[N, 4] i) => (float[N, 4] y) <float[3, 4] t> { y = GatherElements<axis=1>(t, i) }", 17, "rows along the same axis"),
    "ScatterElements along the rows": ("(float[N, 4] x, int64[N, 4] i) => (float[N, 4] y) { y = ScatterElements(x, i, x) }", 17, "writes along axis 0"),
    "ScatterND into rows": (f"{X} <int64[1, 1] i = {{0}}, float[1, 4] u> {{ y = ScatterND(x, i, u) }}", 17, "(ScatterND)"),
    "Squeeze without axes": ("(float[N, 4] x) => (float[N, 4] y) { s = Squeeze(x) y = Add(x, s) }", 17, "leaves out axis 0 if there is one row"),
    "Squeeze of the rows": ("(float[N, 4] x) => (float[4] y) <int64[1] a = {0}> { y = Squeeze(x, a) }", 17, "leaves out axis 0"),
    "Reshape that merges rows": ("(float[N, 3] x) => (float[M, 2] y) <int64[2] s = {-1, 2}> { y = Reshape(x, s) }", 17, "(Reshape): the size of the new axis 0 is not known"),
    "Reshape to a fixed shape": ("(float[N, 4] x) => (float[1, 4] y) <int64[2] s = {1, 4}> { y = Reshape(x, s) }", 17, "no size of the new shape counts the rows"),
    "Reshape that moves rows without a Transpose": ("(float[N, 4] x) => (float[4, N] y) <int64[2] s = {4, -1}> { y = Reshape(x, s) }", 17, "does not hold whole rows"),
    "Flatten that merges rows": ("(float[N, 4] x) => (float[1, M] y) { y = Flatten<axis=0>(x) }", 17, "output 'y' has its rows along axis 1"),
    "several indices for a row": ("(float[N, 4] x) => (float[M] y) <int64[1] s = {-1}> { y = Reshape(x, s) }", 17, "several indices for a row"),
    "broadcasting [B] against [B, S]": (f"{X} {{ m = ReduceMax<axes=[1], keepdims=0>(x) y = Sub(x, m) }}", 17, "along axis 0 of one input and along axis 1 of another"),
    "a constant as long as the batch": (f"{X} <float[3, 1] c> {{ y = Add(x, c) }}", 17, "has a size other than 1 at axis 0"),
    "Where by a constant as long as the batch": (f"{X} <bool[3, 1] c> {{ y = Where(c, x, x) }}", 17, "has a size other than 1 at axis 0"),
    "MatMul that contracts rows": (f"{X} <float[2, 3] c> {{ m = MatMul(c, x) y = Add(x, x) z = ReduceMax<keepdims=0>(m) y2 = Add(y, z) }}".replace("float[N, 4] y", "float[N, 4] y2"), 17, "(MatMul): it sums over axis 0"),
    "MatMul of rows with all rows": (f"{X} {{ t = Transpose(x) m = MatMul(x, t) y = MatMul(m, x) }}", 17, "combines each row of an input with all rows"),
    "Gemm with transA": ("(float[N, 4] x) => (float[4, 3] y) <float[2, 3] w> { y = Gemm<transA=1>(x, w) }", 17, "(Gemm): it sums over axis 0"),
    "Einsum that contracts rows": ("(float[N, 4] x) => (float[4, 4] y) { y = Einsum<equation=\"bi,bj->ij\">(x, x) }", 17, "(Einsum): it sums over axis 0"),
    "Einsum without a result": ("(float[N, 4] x) => (float[N] y) { y = Einsum<equation=\"bi,bi\">(x, x) }", 17, "sums over axis 0"),
    "Einsum's diagonal": ("(float[N, 4] x) => (float[N] y) { y = Einsum<equation=\"ii->i\">(x) }", 17, "diagonal"),
    "Concat of rows": (f"{X} {{ y = Concat<axis=0>(x, x) }}", 17, "several indices for a row"),
    "Concat with a constant": (f"{X} <float[1, 1] c> {{ y = Concat<axis=1>(x, c) }}", 17, "rows along the same axis"),
    "Slice of rows": (f"{X} <int64[1] o = {{0}}, int64[1] e = {{1}}> {{ r = Slice(x, o, e, o) y = Add(x, r) }}", 17, "takes a part of axis 0"),
    "Slice without axes": (f"{X} <int64[1] o = {{0}}, int64[1] e = {{8}}> {{ y = Slice(x, o, e) }}", 17, "takes a part of axis 0"),
    "rows in reverse": (f"{X} <int64[1] a = {{0}}, int64[1] o = {{-1}}, int64[1] e = {{-9223372036854775807}}> {{ y = Slice(x, o, e, a, o) }}", 17, "takes a part of axis 0"),
    "Pad of rows": (f"{X} <int64[4] p = {{1, 0, 0, 0}}> {{ y = Pad(x, p) }}", 17, "pads axis 0"),
    "Tile of rows": (f"{X} <int64[2] p = {{2, 1}}> {{ y = Tile(x, p) }}", 17, "repeats axis 0"),
    "Resize of rows": (f"{X} <float[2] s = {{2.0, 1.0}}> {{ y = Resize(x, , s) }}", 17, "resizes axis 0"),
    "Resize that interpolates across rows": ("(float[N, 3, 4] x) => (float[N, 3, 8] y) <float[3] s = {1.0, 1.0, 2.0}> { y = Resize<mode=\"linear\">(x, , s) }", 17, "interpolates along axis 0"),
    "NonZero": ("(float[N, 4] x) => (int64[2, M] y) { y = NonZero(x) }", 17, "(NonZero)"),
    "Unique": ("(float[N] x) => (float[M] y) { y = Unique(x) }", 17, "(Unique)"),
    "Compress of all": ("(float[N, 4] x) => (float[M] y) <bool[2] c> { y = Compress(x, c) }", 17, "selects from all rows"),
    "NonMaxSuppression": ("(float[N, 5, 4] x, float[N, 1, 5] s) => (int64[M, 3] y) { y = NonMaxSuppression(x, s) }", 17, "(NonMaxSuppression)"),
    "an RNN whose steps are the rows": ("(float[N, 3, 4] x) => (float[N, 1, 3, 2] y) <float[1, 2, 4] w, float[1, 2, 2] r> { y = RNN<hidden_size=2>(x, w, r) }", 17, "(RNN): it takes axis 0"),
    "an LSTM whose first state is as long as the batch": (
        "(float[N, 3, 4] x) => (float[1, N, 2] y) <float[1, 8, 4] w, float[1, 8, 2] r, float[1, 3, 2] h> { t = Transpose<perm=[1, 0, 2]>(x) a, y = LSTM<hidden_size=2>(t, w, r, , , h) }", 17, "input 5 does not have its rows along axis 1"),
    "a GRU whose lengths are as many as the batch": (
        "(float[N, 3, 4] x) => (float[1, N, 2] y) <float[1, 6, 4] w, float[1, 6, 2] r, int32[3] l> { t = Transpose<perm=[1, 0, 2]>(x) a, y = GRU<hidden_size=2>(t, w, r, , l) }", 17, "input 4 does not have its rows along axis 0"),
    "ReverseSequence of rows": ("(float[N, 4] x, int64[N] i) => (float[N, 4] y) { y = ReverseSequence(x, i) }", 17, "(ReverseSequence): it reverses axis 0"),
    "ReverseSequence by a constant as long as the batch": (f"{X} <int64[3] l> {{ y = ReverseSequence<batch_axis=0, time_axis=1>(x, l) }}", 17, "lengths are not those of the rows"),
    "the condition of an If": (f"{X} <float z = {{0}}> {{ s = ReduceSum<keepdims=0>(x) c = Greater(s, z) y = If(c) <then_branch = t () => (float[N, 4] a) {{ a = Add(x, x) }}, else_branch = e () => (float[N, 4] b) {{ b = Neg(x) }}> }}", 17, "(ReduceSum): it reduces axis 0"),
    "an If by the number of rows": (f"{X} <int64 one = {{1}}, int64[1] zero = {{0}}, int64[0] none> {{ s = Shape<end=1>(x) n = Reshape(s, none) c = Equal(n, one) y = If(c) <then_branch = t () => (float[N, 4] a) {{ a = Add(x, x) }}, else_branch = e () => (float[N, 4] b) {{ b = Neg(x) }}> }}", 17, "(Equal): the number of rows becomes a value"),
    "the trip count of a Loop": (f"{X} <bool go = {{1}}> {{ m = ReduceMax<keepdims=0>(x) n = Cast<to=7>(m) y = Loop(n, go, x) <body = b (int64 i, bool c, float[N, 4] s) => (bool d, float[N, 4] t) {{ d = Identity(c) t = Add(s, s) }}> }}", 17, "(ReduceMax): it reduces axis 0"),
    "the condition in a Loop": (f"{X} <int64 n = {{3}}, bool go = {{1}}, float z = {{9}}> {{ y = Loop(n, go, x) <body = b (int64 i, bool c, float[N, 4] s) => (bool d, float[N, 4] t) {{ t = Add(s, s) m = ReduceMax<keepdims=0>(t) d = Less(m, z) }}> }}", 17, "(ReduceMax): it reduces axis 0"),
    "a Loop whose trips are the rows": (f"{X} <bool go = {{1}}, int64[0] none> {{ n = Shape<end=1>(x) m = Reshape(n, none) y = Loop(m, go, x) <body = b (int64 i, bool c, float[N, 4] s) => (bool d, float[N, 4] t) {{ d = Identity(c) t = Add(s, s) }}> }}", 17, "(Loop): how often it runs depends on the rows"),
    "a Scan over the rows": (f"{X} <float[4] z> {{ e, y = Scan<num_scan_inputs=1, body = b (float[4] s, float[4] r) => (float[4] t, float[4] u) {{ t = Add(s, r) u = Identity(t) }}>(z, x) }}", 17, "(Scan): it scans axis 0"),
    "Trilu over rows": (f"{X} {{ y = Trilu(x) }}", 17, "(Trilu): it takes a triangle of axis 0"),
    "EyeLike": (f"{X} {{ e = EyeLike(x) y = Mul(x, e) }}", 17, "(EyeLike)"),
    "CumSum of rows": (f"{X} <int64 a = {{0}}> {{ y = CumSum(x, a) }}", 17, "(CumSum): it sums along axis 0"),
    "OneHot as deep as the batch": ("(int64[N] x) => (float[N, M] y) <float[2] v> { n = Shape(x) y = OneHot(x, n, v) }", 17, "(OneHot): input 1 has the number of rows as a value"),
    "TopK along rows": ("(float[N, 4] x) => (float[1, 4] y) <int64[1] k = {1}> { y, i = TopK<axis=0>(x, k) }", 17, "(TopK): it sorts axis 0"),
    "TopK of as many as there are rows": (f"{X} {{ k = Shape<end=1>(x) y, i = TopK(x, k) }}", 17, "(TopK): input 1 has the number of rows"),
    "StringSplit": ("(string[N] x) => (string[N, M] y) { y, n = StringSplit<delimiter=\" \">(x) }", 20, "(StringSplit): it pads all rows to the longest"),
    "Shape as a value": (f"{X} {{ n = Shape<end=1>(x) f = Cast<to=1>(n) y = Div(x, f) }}", 17, "(Div): the number of rows becomes a value"),
    "Size as a value": (f"{X} {{ n = Size(x) f = Cast<to=1>(n) y = Div(x, f) }}", 17, "(Div): the number of rows becomes a value"),
    "the number of a row as a value": ("(int64[N] x) => (int64[N] y) <int64 o = {0}, int64 e = {1}, int64[0] none> { s = Shape(x) n = Reshape(s, none) r = Range(o, n, e) y = Add(x, r) }", 17, "output 'y' depends on the number of the row"),
    "the number of a row as an answer": ("(int64[N] x) => (int64[N] y) <int64 o = {0}, int64 e = {1}, int64[0] none> { s = Shape(x) n = Reshape(s, none) y = Range(o, n, e) }", 17, "output 'y' depends on the number of the row"),
    "the number of a row in a table": ("(int64[N] x) => (float[N] y) <float[9] t, int64 o = {0}, int64 e = {1}, int64[0] none> { s = Shape(x) n = Reshape(s, none) r = Range(o, n, e) y = Gather(t, r) }", 17, "selects by the number of the row"),
    "the row after the own": ("(float[N, 4] x) => (float[N, 4] y) <int64 o = {0}, int64 e = {1}, int64[0] none> { s = Shape<end=1>(x) n = Reshape(s, none) r = Range(o, n, e) m = Max(r, e) y = Gather(x, m) }", 17, "(Gather): it selects by the number of the row"),
    "an index into the next row": ("(float[N, 4] x) => (float[N, 5] y) <int64 o = {0}, int64 e = {1}, int64 four = {4}, int64 five = {5}, int64[0] none, int64[1] m = {-1}, int64[2] col = {-1, 1}> { s = Shape<end=1>(x) n = Reshape(s, none) r = Range(o, n, e) a = Reshape(r, col) b = Mul(a, four) c = Range(o, five, e) d = Add(b, c) f = Reshape(x, m) y = Gather(f, d) }", 17, "(Gather): it selects by the number of the row"),
    "positions as many as the batch": ("(float[N, 2, 3, 4] x) => (float[N, 2, 3, 4] y) <float[9, 2] c, float[9, 2] s, int64[3, 3] p> { y = RotaryEmbedding(x, c, s, p) }", 23, "input 3 does not have its rows along axis 0"),
    "a Scan over the numbers of rows": (
        "(int64[N] x) => (int64[N] y) <int64 o = {0}, int64 e = {1}, int64[0] none, int64[2] row = {1, -1}, int64[1] a = {0}, int64 c = {0}> { s = Shape(x) n = Reshape(s, none) r = Range(o, n, e) q = Reshape(r, row) f, p = Scan<num_scan_inputs=1, body = b (int64 t, int64[N] v) => (int64 u, int64[N] w) { u = Identity(t) w = Identity(v) }>(c, q) z = Squeeze(p, a) y = Add(x, z) }", 17, "(Scan): the number of rows, or of a row, becomes a value"),
    "Resize to as many as there are rows": (
        "(float[N, 1, 4, 4] x) => (float[N, 1, 1, 4] y) <int64[1] one = {1}, int64[1] four = {4}> { n = Shape<end=1>(x) s = Concat<axis=0>(n, one, n, four) r = Resize<mode=\"linear\">(x, , , s) y = ReduceMax<axes=[2]>(r) }", 17, "(Resize): it resizes axis 2 by the number of rows"),
    "Resize by a scale that counts the rows": (
        "(float[N, 1, 4, 4] x) => (float[N, 1, 1, 4] y) <float[1] one = {1}> { n = Shape<end=1>(x) f = Cast<to=1>(n) s = Concat<axis=0>(one, one, f, one) r = Resize<mode=\"linear\">(x, , s) y = ReduceMax<axes=[2]>(r) }", 17, "(Resize): it resizes axis 2 by the number of rows"),
    "Resize of a constant to as many as there are rows": (f"{X} <float[4] c> {{ n = Shape<end=1>(x) r = Resize(c, , , n) m = ReduceSum(r) y = Mul(x, m) }}", 17, "(Resize): it resizes axis 0 by the number of rows"),
    "a size that grows with the square of the rows": ("(float[N, 4] x) => (float[N, N] y) { n = Shape<end=1>(x) s = Concat<axis=0>(n, n) y = ConstantOfShape(s) }", 17, "square of the number of rows"),
    "the index of the largest in a pool": ("(float[N, 1, 4, 4] x) => (int64[N, 1, 2, 2] i) { y, i = MaxPool<kernel_shape=[3, 3]>(x) }", 17, "(MaxPool): one of its outputs"),
    "quantising each row by a scale of its own": (f"{X} <float[3] s, uint8[3] z> {{ q = QuantizeLinear<axis=0>(x, s, z) y = DequantizeLinear<axis=0>(q, s, z) }}", 17, "(QuantizeLinear): it scales axis 0"),
    "rows that are features": (f"(float[N] x) => (float[1, N] y) {{ y = {ML}.Normalizer<norm=\"L2\">(x) }}", 17, "(Normalizer): it takes the rows for features"),
    "words of rows that are one sequence": ("(string[N] x) => (float[2] y) { y = TfIdfVectorizer<mode=\"TF\", min_gram_length=1, max_gram_length=1, max_skip_count=0, ngram_counts=[0], ngram_indexes=[0, 1], pool_strings=[\"a\", \"b\"]>(x) }", 17, "(TfIdfVectorizer)"),
    "random numbers": (f"{X} {{ r = RandomNormalLike(x) y = Add(x, r) }}", 17, "(RandomNormalLike): it draws random numbers"),
    "Dropout in training mode": (f"{X} <float p, bool t = {{1}}> {{ y = Dropout(x, p, t) }}", 17, "(Dropout): it draws random numbers"),
    "an operator without a rule": (f"{X} {{ y = {MICROSOFT}.Inverse(x) }}", 17, "(Inverse): there is no rule for it"),
    "an output without rows": ("(float[N, 4] x) => (float[1] y) <float[1] c = {2}> { y = Identity(c) }", 17, "output 'y' has no rows"),
    "ZipMap": (f"(float[N, 2] x) => (float[N] y) {{ y = {ML}.ZipMap<classlabels_int64s=[0, 1]>(x) }}", 17, "maps, which are no tensors"),
    "an opset from before the rules": (f"{X} {{ y = Relu(x) }}", 6, "opset 6"),
    "an opset from after the rules": (f"{X} {{ y = Relu(x) }}", 27, "opset 27"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "opset", "reason"), TRAPS.values(), ids=TRAPS)
def test_what_mixes_rows_is_not_proven_and_the_reason_names_it(text, opset, reason):
    verdict = prove(model(text, opset))
    assert not verdict
    assert reason in verdict.reason


SAFE = {
    "a classifier": (f"{X} <float[4, 8] w, float[8] b, float[8, 4] v> {{ h = Gemm(x, w, b) r = Relu(h) o = MatMul(r, v) y = Softmax(o) }}", 17),
    "a convolution": ("(float[N, 3, 8, 8] x) => (float[N, 10] y) <float[4, 3, 3, 3] k, float[64, 10] w> { c = Conv<pads=[1, 1, 1, 1]>(x, k) p = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(c) f = Flatten(p) y = MatMul(f, w) }", 17),
    "a reshape to -1 that keeps rows whole": ("(float[N, 3, 4] x) => (float[N, 3, 4] y) <int64[2] a = {-1, 4}, int64[3] b = {-1, 3, 4}, float[4, 4] w> { f = Reshape(x, a) m = MatMul(f, w) y = Reshape(m, b) }", 17),
    "heads of attention by Shape, Gather, Concat and Reshape": ("(float[N, S, 8] x) => (float[N, S, 8] y) <int64 o = {0}, int64 e = {1}, int64[1] z = {0}, int64[1] h = {2}, int64[1] d = {4}, int64[1] w = {8}> { s = Shape(x) b = Gather(s, o) l = Gather(s, e) bb = Unsqueeze(b, z) ll = Unsqueeze(l, z) t = Concat<axis=0>(bb, ll, h, d) q = Reshape(x, t) qt = Transpose<perm=[0, 2, 1, 3]>(q) kt = Transpose<perm=[0, 2, 3, 1]>(q) a = MatMul(qt, kt) p = Softmax(a) c = MatMul(p, qt) ct = Transpose<perm=[0, 2, 1, 3]>(c) u = Concat<axis=0>(bb, ll, w) y = Reshape(ct, u) }", 17),
    "heads that join the rows, as torch.nn.MultiheadAttention": ("(float[N, 3, 8] x) => (float[N, 3, 8] y) <int64[3] s = {3, -1, 4}, int64[3] r = {3, -1, 8}> { t = Transpose<perm=[1, 0, 2]>(x) f = Reshape(t, s) q = Transpose<perm=[1, 0, 2]>(f) k = Transpose<perm=[0, 2, 1]>(q) a = MatMul(q, k) p = Softmax(a) c = MatMul(p, q) ct = Transpose<perm=[1, 0, 2]>(c) o = Reshape(ct, r) y = Transpose<perm=[1, 0, 2]>(o) }", 17),
    "an embedding with a mask that is expanded by Shape": (f"{WORDS} <float[9, 4] e, int64[1] one = {{1}}, int64[3] any = {{-1, -1, 4}}, int64 m = {{-1}}, int64[3] ones = {{1, 1, 1}}, int64[1] last = {{2}}, float zero = {{0}}> {{ w = Gather(e, x) s = Shape(x) f = ConstantOfShape(s) u = Unsqueeze(f, last) c = Shape(w) eq = Equal(c, m) g = Where(eq, ones, c) z = Expand(u, g) y = Add(w, z) }}", 17),
    "position ids by Range": (f"{WORDS} <float[9, 4] e, float[9, 4] p, int64 o = {{0}}, int64 one = {{1}}, int64[1] z = {{0}}> {{ s = Shape(x) l = Gather(s, one) r = Range(o, l, one) u = Unsqueeze(r, z) d = Expand(u, s) a = Gather(p, d) w = Gather(e, x) y = Add(w, a) }}", 17),
    "the last word of each row by the number of the row": ("(float[N, S, 4] x, int64[N, S] w) => (float[N, 4] y) <int64 o = {0}, int64 one = {1}, int64[1] m = {1}, int64[0] none> { i = ArgMax<axis=1, keepdims=0>(w) s = Shape<end=1>(w) n = Reshape(s, none) r = Range(o, n, one) a = Unsqueeze(r, m) b = Unsqueeze(i, m) p = Concat<axis=1>(a, b) y = GatherND(x, p) }", 17),
    "words of each row by an index into all rows": ("(float[N, 4] x) => (float[N, 4] y) <int64 o = {0}, int64 e = {1}, int64 four = {4}, int64[0] none, int64[1] m = {-1}, int64[2] col = {-1, 1}> { s = Shape<end=1>(x) n = Reshape(s, none) r = Range(o, n, e) a = Reshape(r, col) b = Mul(a, four) c = Range(o, four, e) d = Add(b, c) f = Reshape(x, m) y = Gather(f, d) }", 17),
    "a token that is expanded to all rows": ("(float[N, 3, 4] x) => (float[N, 4, 4] y) <float[1, 1, 4] t, int64[2] m = {-1, -1}> { n = Shape<end=1>(x) g = Concat<axis=0>(n, m) a = Abs(g) o = Concat<axis=0>(n, one, one) c = Expand(t, o) y = Concat<axis=1>(c, x) }".replace("<float[1, 1, 4] t,", "<float[1, 1, 4] t, int64[1] one = {1},"), 17),
    "an LSTM with rows along axis 1 and a state of its own": ("(float[N, 3, 4] x) => (float[N, 2] y) <float[1, 8, 4] w, float[1, 8, 2] r, int64[1] one = {1}, int64[1] two = {2}, int64[1] zero = {0}> { n = Shape<end=1>(x) g = Concat<axis=0>(one, n, two) h = ConstantOfShape(g) t = Transpose<perm=[1, 0, 2]>(x) a, l, c = LSTM<hidden_size=2>(t, w, r, , , h, h) y = Squeeze(l, zero) }", 17),
    "an If by a size that is the same in all batches": ("(float[N, S] x) => (float[N, S] y) <int64 four = {4}, int64[0] none> { s = Shape<start=1>(x) l = Reshape(s, none) c = Greater(l, four) y = If(c) <then_branch = t () => (float[N, S] a) { a = Add(x, x) }, else_branch = e () => (float[N, S] b) { b = Softmax(x) }> }", 17),
    "a Loop over what is the same in all batches": (f"{X} <int64 n = {{3}}, bool go = {{1}}, float[4, 4] w> {{ y = Loop(n, go, x) <body = b (int64 i, bool c, float[N, 4] s) => (bool d, float[N, 4] t) {{ d = Identity(c) t = MatMul(s, w) }}> }}", 17),
    "a Scan over steps": ("(float[N, 3, 4] x) => (float[N, 4] y) { z = ReduceMax<axes=[1], keepdims=0>(x) y, u = Scan<num_scan_inputs=1, scan_input_axes=[1], body = b (float[N, 4] s, float[N, 4] r) => (float[N, 4] t, float[N, 4] v) { t = Add(s, r) v = Identity(t) }>(z, x) }", 17),
    "Softmax before opset 13": (f"{X} {{ y = Softmax(x) }}", 12),
    "Einsum over features": ("(float[N, 3, 4] x) => (float[N, 3, 3] y) { y = Einsum<equation=\"bik,bjk->bij\">(x, x) }", 17),
    "quantised weights": (f"{X} <uint8[4, 4] w, float s = {{0.5}}, uint8 z = {{3}}> {{ q = QuantizeLinear(x, s, z) p = QLinearMatMul(q, s, z, w, s, z, s, z) y = DequantizeLinear(p, s, z) }}", 17),
    "a resize to twice the size": ("(float[N, 3, 4, 4] x) => (float[N, 3, 8, 8] y) <float[4] s = {1.0, 1.0, 2.0, 2.0}> { y = Resize<mode=\"linear\">(x, , s) }", 17),
    "sklearn's logistic regression": (f"{X} {{ l, y = {ML}.LinearClassifier<classlabels_ints=[0, 1], coefficients=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], intercepts=[0.0, 1.0]>(x) }}", 17),
    "sklearn's labels": (f"(float[N, 3] x) => (string[N] y) <string[3] l, int64[1] s = {{-1}}> {{ i = ArgMax<axis=1>(x) a = {ML}.ArrayFeatureExtractor(l, i) y = Reshape(a, s) }}", 17),
    "fused attention": (f"(float[N, S, 8] x) => (float[N, S, 8] y) <float[8, 24] w, float[24] b, float[8] g> {{ a = {MICROSOFT}.Attention<num_heads=2>(x, w, b) y = {MICROSOFT}.SkipLayerNormalization(a, x, g, g) }}", 17),
    "an operator that the standard defines by others": (f"{X} {{ y = Mish(x) }}", 18),
    "sizes that an older exporter slices": ("(float[N, 3, 4] x) => (float[N, 12] y) <int64[1] o = {0}, int64[1] e = {1}, int64[1] m = {-1}> { s = Shape(x) b = Slice(s, o, e, o) t = Concat<axis=0>(b, m) y = Reshape(x, t) }", 17),
}  # fmt: skip


@pytest.mark.parametrize(("text", "opset"), SAFE.values(), ids=SAFE)
def test_what_keeps_rows_apart_is_proven_and_does(text, opset):
    made = model(text, opset)
    assert prove(made).reason == ""
    running = session(made)
    rng = np.random.default_rng(0)
    feeds = {}
    for node in running.get_inputs():
        shape = [5, *(size if isinstance(size, int) else 6 for size in node.shape[1:])]
        whole = node.type == "tensor(int64)"
        feeds[node.name] = rng.integers(0, 3, shape) if whole else rng.normal(size=shape).astype(np.float32)
    together = running.run(None, feeds)
    for row in range(5):
        alone = running.run(None, {name: array[row : row + 1] for name, array in feeds.items()})
        for one, all_rows in zip(alone, together, strict=True):
            assert same(one, all_rows[row : row + 1])


def test_functions_of_the_model_are_walked_with_the_attributes_of_their_call():
    functions = (
        '<domain: "local", opset_import: ["": 17]> Inner <axis> (a) => (b) { b = Softmax<axis: int = @axis>(a) }'
    )
    safe, mixed = (model(f"{X} {{ y = local.Inner<axis={axis}>(x) }}", functions=functions) for axis in (1, 0))
    assert prove(safe)
    assert "node 'y' (Inner), node 'b' (Softmax): it normalises over axis 0" in prove(mixed).reason


def test_a_node_in_a_branch_is_named_with_the_way_to_it():
    text = f"{X} <bool c = {{0}}, bool[1] d> {{ y = If(c) <then_branch = t () => (float[N, 4] a) {{ a = Neg(x) }}, else_branch = e () => (float[N, 4] b) {{ b = Softmax<axis=0>(x) }}> }}"
    assert "node 'y' (If), node 'b' (Softmax)" in prove(model(text)).reason


def test_a_value_that_requests_may_replace_is_no_constant():
    shape = "(float[N, 4] x, int64[2] s) => (float[N, 4] y) <int64[2] s = {-1, 4}> { y = Reshape(x, s) }"
    assert not prove(model(shape))
    scale = "(float[N, 4] x, float[1] s) => (float[N, 4] y) <float[1] s = {2}> { y = Mul(x, s) }"
    assert prove(model(scale))


def test_weights_in_other_files_are_not_read():
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="missing.bin")
    made = model(f"{X} {{ y = MatMul(x, w) }}")
    made.graph.initializer.append(weight)
    assert prove(made)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Reshape", ["x"], ["y"]),
        helper.make_node("Transpose", ["x"], ["y"], perm=[0, 7]),
        helper.make_node("Concat", ["x", "x"], ["y"]),
        helper.make_node("Softmax", ["x"], ["y"], axis="first"),
        helper.make_node("Einsum", ["x"], ["y"], equation="ab,bc->ac"),
        helper.make_node("Loop", ["x"], ["y"]),
        helper.make_node("If", [], ["y"]),
        helper.make_node("Scan", ["x"], ["y"], num_scan_inputs=9),
        helper.make_node("Conv", ["x", "x"], ["y"], strides=[0, 0]),
        helper.make_node("Relu", ["nowhere"], ["y"]),
        helper.make_node("Constant", [], ["y"]),
    ],
    ids=lambda node: node.op_type,
)
def test_a_malformed_node_is_not_proven_and_does_no_harm(node):
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", 1, ["N", 4])], [helper.make_tensor_value_info("y", 1, None)]
    )
    assert not prove(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))


def test_sizes_of_two_nodes_of_one_name_are_not_taken_for_equal():
    """A node without a name is called by its output in messages, which may be another node's name."""

    def branches(yes, no):
        return f"<then_branch = t () => (float[K] p) {{ p = Identity({yes}) }}, else_branch = f () => (float[L] q) {{ q = Identity({no}) }}>"

    made = model(
        "(float[N, 1] x) => (float[N, 4] y) <float[2] two, float[4] four, float[2] w = {1.5, 2.5}, float o = {0}, int64[1] one = {1}, int64[1] m = {-1}>"
        f"{{ r = ReduceSum<keepdims=0>(w) c = Greater(r, o) a = If(c) {branches('four', 'two')} b = If(c) {branches('two', 'four')}"
        " s = Shape(a) t = Shape(b) u = Concat<axis=0>(one, s) d = Expand(x, u) v = Concat<axis=0>(m, t) e = Reshape(d, v)"
        " f = Transpose(e) g = Concat<axis=0>(s, m) h = Reshape(f, g) y = Transpose(h) }"
    )
    next(node for node in made.graph.node if node.op_type == "If").name = "b"
    assert "(Reshape): the size of the new axis 0 is not known" in prove(made).reason


@pytest.mark.parametrize(
    ("domain", "operator", "opset", "reason"),
    [
        # ONNX Runtime has an operator of this name, which it runs instead.
        (MICROSOFT, "Unique", 17, "(Unique): the model defines a function in a domain of operators"),
        # It runs the Softmax of the model's opset.
        ("local", "F", 17, "(F): its function is of opset 17, and the model of 12"),
        ("local", "F", 12, "(Softmax): it normalises over axis 1"),
    ],
)
def test_a_function_that_runs_otherwise_than_it_is_written_is_not_proven(domain, operator, opset, reason):
    made = model(f"{X} {{ y = {domain}.{operator}(x) }}", 12)
    nodes = [
        helper.make_node("Transpose", ["a"], ["b"]),
        helper.make_node("Softmax", ["b"], ["c"], axis=0),
        helper.make_node("Transpose", ["c"], ["d"]),
    ]
    made.functions.append(helper.make_function(domain, operator, ["a"], ["d"], nodes, [helper.make_opsetid("", opset)]))
    assert reason in prove(made).reason


def test_a_malformed_constant_is_not_proven_and_does_no_harm():
    made = model(f"{X} {{ y = Add(x, c) }}")
    made.graph.initializer.append(TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[3], raw_data=b"short"))
    assert "not as ONNX defines it" in prove(made).reason


def test_what_would_take_for_ever_is_given_up(monkeypatch):
    monkeypatch.setattr(prover, "_MOST_NODES", 20_000)
    functions = [
        helper.make_function(
            "local",
            f"F{depth}",
            ["a"],
            ["c"],
            calls(depth),
            [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
        )
        for depth in range(25)
    ]
    made = model(f"{X} {{ y = local.F24(x) }}")
    made.functions.extend(functions)
    assert "too many nodes" in prove(made).reason
    squares = [helper.make_node("Shape", ["x"], ["t0"])]
    squares += [helper.make_node("Mul", [f"t{turn}"] * 2, [f"t{turn + 1}"]) for turn in range(60)]
    made = model(f"{X} {{ y = Reshape(x, t60) }}")
    made.graph.node.extend(squares[::-1])
    made.graph.node.reverse()
    assert not prove(made)


def calls(depth):
    operator, domain = (f"F{depth - 1}", "local") if depth else ("Relu", "")
    return [
        helper.make_node(operator, ["a"], ["b"], domain=domain),
        helper.make_node(operator, ["b"], ["c"], domain=domain),
    ]


def test_a_large_model_is_walked_in_linear_time_and_its_weights_are_not_copied():
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    nodes = [helper.make_node("MatMul", [f"t{turn}" if turn else "x", "w"], [f"t{turn + 1}"]) for turn in range(20_000)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 4])],
        [helper.make_tensor_value_info("t20000", 1, None)],
        [weight],
    )
    assert prove(onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
