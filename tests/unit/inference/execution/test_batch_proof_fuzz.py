"""Whatever is proven of random graphs holds in ONNX Runtime, for every tensor in them."""

import contextlib
import math
import os

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from services.inference.execution.batch_proof.abstract_value import Content, Tensor, Unknown
from services.inference.execution.batch_proof.prover import Scope, Walk
from services.inference.execution.batch_proof.sizes import ONE, Size
from tests.random_graphs import MICROSOFT, ML, ROWS, as_model, captured, draw_inputs, random_graph, same, session

MORE_ROWS = 5
FIRST_SEED = int(os.environ.get("RINGMESH_TEST_FIRST_SEED", "10000"))
SEEDS = int(os.environ.get("RINGMESH_TEST_SEEDS", "1000"))


def claims(graph, model):
    """What the prover knows of each tensor."""
    walk = Walk(model)
    scope = Scope({"": graph.opset, ML: 3, MICROSOFT: 1})
    for one in model.graph.input:
        scope.values[one.name] = walk.graph_input(one, replaceable=False)
    walk.run(model.graph, scope)
    return scope.values


def check(seed):
    """How many nodes there are, and of how many all is proven. Fails where something proven does not hold."""
    graph = random_graph(seed)
    model = as_model(
        graph.nodes, {name: graph.arrays[name] for name in graph.inputs}, graph.initializers, [], graph.opset
    )
    known = claims(graph, model)
    unknown = {name for name, value in known.items() if isinstance(value, Unknown)}
    # An untaken branch may look at what is not proven.
    nodes = [node for node in graph.nodes if node.output[0] not in unknown and not captured(node) & unknown]
    names = [name for node in nodes for name in node.output if name not in unknown]
    inputs = {name: graph.arrays[name] for name in graph.inputs}
    if not names:
        return len(graph.nodes), 0
    try:
        running = session(as_model(nodes, inputs, graph.initializers, names, graph.opset))
        running.run(names, inputs)
    except Exception:  # what ran node by node does not as a whole, as its own inference of shapes errs
        return len(graph.nodes), 0
    # These rows run together, so each must run alone; others may be beyond some table.
    compare(seed, running, names, known, inputs, (1, 2, ROWS))
    feeds = draw_inputs(np.random.default_rng(seed + 1), graph.inputs, MORE_ROWS)
    with contextlib.suppress(InvalidArgument, Fail, RuntimeException):
        compare(seed, running, names, known, feeds, (2, MORE_ROWS))
    return len(graph.nodes), len(nodes)


def compare(seed, running, names, known, feeds, batches):
    """Checks what is known in batches of the first rows. Raises what ONNX Runtime raises."""
    alone = [
        running.run(names, {name: array[row : row + 1] for name, array in feeds.items()}) for row in range(max(batches))
    ]
    symbols = {}
    for rows in batches:
        together = running.run(names, {name: array[:rows] for name, array in feeds.items()})
        for place, name in enumerate(names):
            apart = [answers[place] for answers in alone[:rows]]
            holds(known[name], together[place], apart, rows, symbols, f"seed {seed}, {rows} rows: {name}")


def valued(size, rows, symbols):
    """None where it is not known yet."""
    factors = [rows if symbol == 0 else symbols.get(symbol) for symbol in size.symbols]
    return None if None in factors else size.coefficient * math.prod(factors)


def holds(value, together, apart, rows, symbols, where):
    assert isinstance(value, Tensor)
    if value.shape is not None:
        assert len(value.shape) == together.ndim, where
        for size, real in zip(value.shape, together.shape, strict=True):
            if len(size.symbols) == 1 and size.symbols != (0,) and size.coefficient == 1:
                assert symbols.setdefault(size.symbols[0], real) == real, f"{where}: {size} in {value.shape}"
            elif (told := valued(size, rows, symbols)) is not None:
                assert told == real, f"{where}: {size} of {value.shape} is {together.shape}"
    if value.values is not None:
        for told, real in zip(value.values.flat, together.flat, strict=True):
            expected = valued(told, rows, symbols) if isinstance(told, Size) else told
            if isinstance(told, Size) and len(told.symbols) == 1 and told.coefficient == 1 and told.symbols[0] > 0:
                assert symbols.setdefault(told.symbols[0], real) == real, f"{where}: {told}"
            elif expected is not None and (not isinstance(told, Size) or all(symbol >= 0 for symbol in told.symbols)):
                assert expected == real, f"{where}: {value.values} is {together}"
    if value.below is not None and (most := valued(value.below, rows, symbols)) is not None:
        assert ((together >= 0) & (together < most)).all(), f"{where} is not below {most}"
    if value.rows is None:
        if value.independent:
            assert all(same(one, together) for one in apart), f"{where} depends on the rows"
        return
    axis, outer = value.rows.axis, valued(value.rows.outer, rows, symbols)
    inner = valued(value.rows.inner, rows, symbols)
    if outer is None and value.rows.inner == ONE and together.size:
        outer = together.shape[axis] // rows
    if outer is None or (inner is None and together.shape[axis] % (outer * rows)):
        return
    size = together.shape[axis]
    inner = size // max(outer * rows, 1)
    assert outer * rows * inner == size, f"{where}: {outer} by {rows} by {inner} at axis {axis} of {together.shape}"
    folded = together.reshape(*together.shape[:axis], outer, rows, inner, *together.shape[axis + 1 :])
    if value.content in (Content.POSITION, Content.POSITION_IN_ALL):
        stride = valued(value.stride, rows, symbols)
        numbers = np.moveaxis(folded, axis + 1, 0) - np.arange(rows).reshape(-1, *[1] * (folded.ndim - 1)) * (
            stride or 0
        )
        most = 1 if value.content is Content.POSITION else stride
        assert stride is None or ((numbers >= 0) & (numbers < most)).all(), f"{where} is no {value.content}"
    if value.content is not Content.OWN:
        return
    for row in range(rows):
        own = folded.take(row, axis + 1).reshape(apart[row].shape)
        assert same(apart[row], own), f"{where} depends on other rows than {row}: {apart[row]} is {own}"


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_what_is_proven_of_random_graphs_holds_in_onnxruntime(first):
    counts = np.sum([check(seed) for seed in range(first, first + 50)], axis=0)
    assert counts[1] > 0.3 * counts[0]  # else it would prove little of anything


# In parts, because xdist begins with the files that have the most tests.
@pytest.mark.proof
@pytest.mark.parametrize("first", range(FIRST_SEED, FIRST_SEED + SEEDS, 50))
def test_what_is_proven_of_many_random_graphs_holds_in_onnxruntime(first):
    for seed in range(first, first + 50):
        check(seed)
