"""Sums of products: MatMul, Gemm, Einsum and their relatives."""

from __future__ import annotations

from collections.abc import Sequence

from services.inference.execution.batch_proof.abstract_value import RowAxis, Shape, Tensor
from services.inference.execution.batch_proof.operator_call import (
    NotProvenError,
    OperatorCall,
    broadcast,
    common_rows,
    shape_of,
)
from services.inference.execution.batch_proof.registry import Outcome, rule
from services.inference.execution.batch_proof.sizes import ONE


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


def product_of_matrices(call: OperatorCall, a: Tensor, b: Tensor, flip_a: bool = False, flip_b: bool = False) -> Tensor:
    """The product by the rules of NumPy's matmul. `flip_a` and `flip_b` transpose a matrix first."""
    first, second = len(shape_of(a, "the left matrix")), len(shape_of(b, "the right matrix"))
    if not first or not second:
        raise NotProvenError("it multiplies a scalar")
    stack = [f"stack{axis}" for axis in range(max(first, second) - 2)]
    left = ["k"] if first == 1 else ["k", "m"] if flip_a else ["m", "k"]
    right = ["k"] if second == 1 else ["n", "k"] if flip_b else ["k", "n"]
    labels = [[*stack[len(stack) - max(rank - 2, 0) :], *names] for rank, names in ((first, left), (second, right))]
    result = [*stack, *(["m"] if first > 1 else []), *(["n"] if second > 1 else [])]
    return contract((a, b), labels, result, call)


def transposed(call: OperatorCall) -> tuple[bool, bool]:
    return bool(call.attribute("transA", 0)), bool(call.attribute("transB", 0))


@rule("MatMul", "com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul")
def matmul(call: OperatorCall) -> Outcome:
    """Two matrices, or two stacks of matrices. Microsoft's operators may transpose the matrices first."""
    if call.attribute("transBatchA", 0) or call.attribute("transBatchB", 0):
        raise NotProvenError("it transposes the stack of matrices")
    return product_of_matrices(call, call.input(0), call.input(1), *transposed(call))


@rule("Gemm", "com.microsoft.FusedGemm")
def gemm(call: OperatorCall) -> Outcome:
    """A product of matrices. The third input is added by broadcasting."""
    if any(len(call.shape(index)) != 2 for index in (0, 1)):
        raise NotProvenError("it is for matrices")
    made = product_of_matrices(call, call.input(0), call.input(1), *transposed(call))
    if (added := call.maybe(2)) is None:
        return made
    shape = broadcast([shape_of(made, "the product"), shape_of(added, "input 2")], call.symbols)
    return Tensor(shape, common_rows([made, added], 2))


@rule("com.microsoft.CDist")
def distances(call: OperatorCall) -> Outcome:
    """Distances from each row of one table to each row of another."""
    return contract((call.input(0), call.input(1)), ("mk", "nk"), "mn", call)


@rule("Einsum")
def einsum(call: OperatorCall) -> Outcome:
    equation = call.attribute("equation").decode().replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(call.given):
        raise NotProvenError(f"its equation {equation!r} is for {len(terms)} inputs")
    # The number of axes that the ellipsis of each term stands for.
    counts = [
        len(shape_of(tensor, "an input")) - len(term.replace("...", ""))
        for tensor, term in zip(call.given, terms, strict=True)
    ]
    most = max((count for count, term in zip(counts, terms, strict=True) if "..." in term), default=0)
    labels = [_labels(term, count, most) for term, count in zip(terms, counts, strict=True)]
    if arrow:
        result = _labels(right, most, most)
    else:
        letters = sorted({letter for term in terms for letter in term if letter != "."})
        result = [*_labels("...", most, most), *(letter for letter in letters if left.count(letter) == 1)]
    return contract(call.given, labels, result, call)


def _labels(term: str, count: int, most: int) -> list[str]:
    """The letters of a term. Its ellipsis becomes the last `count` of `most` names."""
    before, dots, after = term.partition("...")
    names = [f"...{axis}" for axis in range(most - count, most)] if dots else []
    return [*before, *names, *after]
