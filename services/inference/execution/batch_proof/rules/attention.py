"""Fused attention, and the other fused operators in exports of transformers."""

from __future__ import annotations

from services.inference.execution.batch_proof.abstract_value import RowAxis, Tensor
from services.inference.execution.batch_proof.operator_call import NotProvenError, OperatorCall
from services.inference.execution.batch_proof.registry import Outcome, rule
from services.inference.execution.batch_proof.sizes import ONE, Size

_FIRST = RowAxis(0)


def _along(call: OperatorCall, axis: int, *indices: int, one: bool = False) -> None:
    """Raises NotProvenError unless the given inputs have their rows along `axis`, or with `one`, size 1 there."""
    for index in indices:
        tensor = call.maybe(index)
        if tensor is None or tensor.rows == RowAxis(axis):
            continue
        if one and tensor.rows is None and tensor.shape is not None and tensor.shape[axis : axis + 1] == (ONE,):
            continue
        raise NotProvenError(f"input {index} does not have its rows along axis {axis}")


def _last(call: OperatorCall, index: int) -> Size:
    """The last size of an optional input; a new unknown size if the input is left out."""
    return call.fresh() if call.maybe(index) is None else call.shape(index)[-1]


def _present(call: OperatorCall, batch: Size) -> Tensor:
    return Tensor((batch, call.fresh(), call.fresh(), call.fresh()), _FIRST)


@rule("com.microsoft.Attention", "com.microsoft.QAttention")
def packed_attention(call: OperatorCall) -> Outcome:
    """One input and packed weights, with an optional mask and past."""
    mask, past, bias = (5, 8, 99) if call.operator == "QAttention" else (3, 4, 5)
    _along(call, 0, 0, mask)
    _along(call, 1, past)
    _along(call, 0, bias, one=True)
    call.batch_independent_except(0, mask, past, bias)
    if call.maybe(6) is not None and call.operator == "Attention":
        raise NotProvenError("it shares a buffer for its past")
    batch, length, _ = call.shape(0)
    if call.attribute("qkv_hidden_sizes"):
        width = Size(int(call.attribute("qkv_hidden_sizes")[2]))
    else:
        width = _last(call, 1).divided_by(Size(3)) or call.fresh()
    present = Tensor((Size(2), batch, call.fresh(), call.fresh(), call.fresh()), RowAxis(1))
    return (Tensor((batch, length, width), _FIRST), present)


@rule("com.microsoft.MultiHeadAttention")
def multi_head_attention(call: OperatorCall) -> Outcome:
    """Queries, keys and values with rows along axis 0, with an optional mask and past."""
    _along(call, 0, 0, 1, 2, 4, 6, 7)
    _along(call, 0, 5, one=True)
    call.batch_independent_except(0, 1, 2, 4, 5, 6, 7)
    if any(tensor is not None for tensor in call.inputs[8:]):
        raise NotProvenError("it shares a buffer for its past")
    shape = call.shape(0)
    if len(shape) != 3:
        raise NotProvenError("its queries are packed")
    width = _last(call, 2) if call.maybe(2) is not None and len(call.shape(2)) == 3 else call.fresh()
    present = _present(call, shape[0])
    return (Tensor((*shape[:2], width), _FIRST), present, present)


@rule("Attention")
def attention(call: OperatorCall) -> Outcome:
    """ONNX's own operator. It adds the mask by broadcasting with [rows, heads, queries, keys]."""
    _along(call, 0, 0, 1, 2, 4, 5)
    mask = call.maybe(3)
    shape = call.shape(0)
    if mask is not None and (mask.rows is not None or len(call.shape(3)) >= 4):
        if len(call.shape(3)) != 4:
            raise NotProvenError("the rows of its mask do not lie along axis 0 of four")
        _along(call, 0, 3, one=True)
    if any(tensor is not None for tensor in call.inputs[6:]):
        raise NotProvenError("there is no rule for its other inputs")
    width = _last(call, 2) if len(shape) == 4 else call.fresh()
    present = _present(call, shape[0])
    return (Tensor((*shape[:-1], width), _FIRST), present, present, None)


@rule("com.microsoft.EmbedLayerNormalization")
def embedding(call: OperatorCall) -> Outcome:
    _along(call, 0, 0, 1, 7)
    _along(call, 0, 8, one=True)
    call.batch_independent_except(0, 1, 7, 8)
    batch, length = call.shape(0)
    made = Tensor((batch, length, _last(call, 2)), _FIRST)
    return (made, Tensor((batch,), _FIRST), made)


@rule("RotaryEmbedding")
def rotary_embedding(call: OperatorCall) -> Outcome:
    """Rotates by shared tables and the positions of each row, or by tables of each row."""
    return _rotated(call, 3, (1, 2))


@rule("com.microsoft.RotaryEmbedding")
def microsofts_rotary_embedding(call: OperatorCall) -> Outcome:
    """As ONNX's own operator, with inputs in another order. A single position may be the first one of all rows."""
    if call.attribute("is_packed_batching", 0):
        raise NotProvenError("its rows are packed")
    return _rotated(call, 1, (2, 3))


def _rotated(call: OperatorCall, positions: int, tables: tuple[int, int]) -> Outcome:
    _along(call, 0, 0)
    if call.maybe(positions) is not None and call.shape(positions) != (ONE,):
        _along(call, 0, positions)
    for index in tables:
        if len(call.shape(index)) == 3:
            _along(call, 0, index)
        else:
            call.batch_independent(index)
    return call.keeping((), "")
