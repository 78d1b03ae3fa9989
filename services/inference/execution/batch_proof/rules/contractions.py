"""Sums of products: MatMul, Gemm, Einsum and their relatives."""

from __future__ import annotations

from collections.abc import Sequence

from services.inference.execution.batch_proof.abstract_value import RowAxis, Shape, Tensor
from services.inference.execution.batch_proof.operator_call import (
    NotProvenError,
    OperatorCall,
    broadcast,
    common_rows,
    not_along,
    shape_of,
)
from services.inference.execution.batch_proof.registry import MICROSOFT, Outcome, rule
from services.inference.execution.batch_proof.sizes import ONE, Size


def contract(
    tensors: Sequence[Tensor], labels: Sequence[Sequence[str]], result: Sequence[str], call: OperatorCall
) -> Tensor:
    """Einstein summation. Dimensions with equal labels are aligned; labels that are not in `result` are summed over."""
    found: tuple[str, RowAxis] | None = None
    sizes: dict[str, list[Shape]] = {}
    for tensor, names in zip(tensors, labels, strict=True):
        shape = shape_of(tensor, "an input")
        if len(shape) != len(names):
            raise NotProvenError(f"an input has {len(shape)} axes instead of {len(names)}")
        for name, size in zip(names, shape, strict=True):
            sizes.setdefault(name, []).append((size,))
        if tensor.rows is None:
            continue
        name = names[tensor.rows.axis]
        if list(names).count(name) > 1:
            raise NotProvenError(f"it takes a diagonal of axis {tensor.rows.axis}, along which the rows lie")
        if name not in result:
            raise NotProvenError(f"it sums over axis {tensor.rows.axis}, along which the rows lie")
        rows = tensor.rows.at(list(result).index(name))
        if found is not None and found[1] != rows:
            raise NotProvenError("it combines each row of an input with all rows of another")
        found = (name, rows)
    if found is not None:
        for tensor, names in zip(tensors, labels, strict=True):
            if tensor.rows is None and found[0] in names and (tensor.shape or ())[list(names).index(found[0])] != ONE:
                raise NotProvenError("an input without rows has a size other than 1 where another has rows")
            if tensor.rows is not None and names[tensor.rows.axis] != found[0]:
                raise NotProvenError("it combines each row of an input with all rows of another")
    shape = tuple(broadcast(sizes[name], call.symbols)[0] for name in result)
    return Tensor(shape, None if found is None else found[1])


def product_of_matrices(
    call: OperatorCall, a: Tensor, b: Tensor, *, flip_a: bool = False, flip_b: bool = False
) -> Tensor:
    """The product by the rules of NumPy's matmul. `flip_a` and `flip_b` transpose a matrix first."""
    first, second = len(shape_of(a, "the left matrix")), len(shape_of(b, "the right matrix"))
    if not first or not second:
        raise NotProvenError("it multiplies a scalar")
    rank = max(first, second)
    stack = [f"stack{place}" for place in range(rank - 2)]
    left = [*stack[len(stack) - max(first - 2, 0) :], *(("k",) if first == 1 else ("k", "m") if flip_a else ("m", "k"))]
    right = [
        *stack[len(stack) - max(second - 2, 0) :],
        *(("k",) if second == 1 else ("n", "k") if flip_b else ("k", "n")),
    ]
    result = [*stack, *(("m",) if first > 1 else ()), *(("n",) if second > 1 else ())]
    return contract((a, b), (left, right), result, call)


@rule("MatMul")
def matmul(call: OperatorCall) -> Outcome:
    """Two matrices, or two stacks of matrices."""
    return product_of_matrices(call, call.input(0), call.input(1))


# Quantised products: inputs with the right matrix, and with the scales and zero points of the left and the right one.
_QUANTISED = {
    "MatMulInteger": (1, (2,), (3,)),
    "MatMulIntegerToFloat": (1, (2, 4), (3, 5)),
    "QLinearMatMul": (3, (1, 2, 6, 7), (4, 5)),
}


@rule("MatMulInteger", "QLinearMatMul")
@rule("MatMulIntegerToFloat", domain=MICROSOFT)
def quantised_matmul(call: OperatorCall) -> Outcome:
    """A scale or zero point may have a value per row or column of a matrix, unless the rows of the batch lie there."""
    right, of_left, of_right = _QUANTISED[call.operator]
    call.batch_independent_except(0, right)
    for place in (*of_left, *(of_right if call.input(right).rows is not None else ())):
        if (value := call.maybe(place)) is not None:
            one_value(value)
    made = product_of_matrices(call, call.input(0), call.input(right))
    if call.maybe(6) is not None and call.operator == "MatMulIntegerToFloat":
        not_along(made.rows, [len(made.shape or ()) - 1], "adds a bias along")
    return made


def one_value(tensor: Tensor) -> None:
    """Raises NotProvenError if a scale or zero point has several values."""
    if any(size != ONE for size in shape_of(tensor, "a scale or zero point")):
        raise NotProvenError("a scale or zero point has several values")


@rule("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(call: OperatorCall) -> Outcome:
    """MatMul that may transpose the matrices first."""
    if call.attribute("transBatchA", 0) or call.attribute("transBatchB", 0):
        raise NotProvenError("it transposes the stack of matrices")
    flip_a, flip_b = bool(call.attribute("transA", 0)), bool(call.attribute("transB", 0))
    return product_of_matrices(call, call.input(0), call.input(1), flip_a=flip_a, flip_b=flip_b)


@rule("Gemm")
@rule("FusedGemm", domain=MICROSOFT)
def gemm(call: OperatorCall) -> Outcome:
    """A product of matrices. The third input is added by broadcasting."""
    flip_a, flip_b = bool(call.attribute("transA", 0)), bool(call.attribute("transB", 0))
    if any(len(call.shape(place)) != 2 for place in (0, 1)):
        raise NotProvenError("it is for matrices")
    made = product_of_matrices(call, call.input(0), call.input(1), flip_a=flip_a, flip_b=flip_b)
    if (added := call.maybe(2)) is None:
        return made
    shape = broadcast([shape_of(made, "the product"), shape_of(added, "input 2")], call.symbols)
    return Tensor(shape, common_rows([made, added], 2))


@rule("MatMulNBits", domain=MICROSOFT)
def matmul_n_bits(call: OperatorCall) -> Outcome:
    """A product with packed weights of N columns."""
    call.batch_independent_except(0)
    shape, rows = call.shape(0), call.input(0).rows
    if rows is not None and rows.axis == len(shape) - 1:
        raise NotProvenError(f"it sums over axis {rows.axis}, along which the rows lie")
    return Tensor((*shape[:-1], Size(int(call.attribute("N")))), rows)


@rule("CDist", domain=MICROSOFT)
def distances(call: OperatorCall) -> Outcome:
    """Distances from each row of one table to each row of another."""
    return contract((call.input(0), call.input(1)), (("m", "k"), ("n", "k")), ("m", "n"), call)


@rule("Einsum")
def einsum(call: OperatorCall) -> Outcome:
    """The contraction that the equation describes."""
    equation = call.attribute("equation").decode().replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(call.given):
        raise NotProvenError(f"its equation {equation!r} is for {len(terms)} inputs")
    hidden = max(
        (
            len(shape_of(one, "an input")) - len(term.replace("...", ""))
            for one, term in zip(call.given, terms, strict=True)
            if "..." in term
        ),
        default=0,
    )
    labels = [
        _labels(term, len(shape_of(tensor, "an input")) - len(term.replace("...", "")), hidden)
        for tensor, term in zip(call.given, terms, strict=True)
    ]
    if arrow:
        result = _labels(right, hidden if "..." in right else 0, hidden)
    else:
        letters = sorted({letter for term in terms for letter in term if letter != "."})
        result = [*_labels("...", hidden, hidden), *(letter for letter in letters if left.count(letter) == 1)]
    return contract(call.given, labels, result, call)


def _labels(term: str, count: int, hidden: int) -> list[str]:
    """The letters of a term. Its ellipsis becomes the last `count` of `hidden` names."""
    before, dots, after = term.partition("...")
    names = [f"...{place}" for place in range(hidden - count, hidden)] if dots else []
    return [*before, *names, *after]
