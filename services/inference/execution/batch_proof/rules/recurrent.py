"""RNN, GRU and LSTM, whose rows lie along axis 1 unless `layout` is 1."""

from __future__ import annotations

from services.inference.execution.batch_proof.abstract_value import RowAxis, Tensor
from services.inference.execution.batch_proof.operator_call import NotProvenError, OperatorCall, shape_of
from services.inference.execution.batch_proof.registry import Outcome, rule
from services.inference.execution.batch_proof.sizes import Size


@rule("RNN", "GRU", "LSTM")
def recurrent(call: OperatorCall) -> Outcome:
    """Steps along one axis of the input. Each row has its own state."""
    flipped = bool(call.attribute("layout", 0))
    axis = 0 if flipped else 1
    data, shape = call.input(0), call.shape(0)
    rows = data.rows
    call.batch_independent(1, 2, 3, 7)
    if rows is None:
        call.batch_independent_except()
    elif rows.axis != axis:
        raise NotProvenError(f"it takes axis {rows.axis}, along which the rows lie, for steps or features")
    for place, along in ((4, 0), (5, axis), (6, axis)):
        state = call.maybe(place)
        if rows is not None and state is not None and state.rows != rows.at(along):
            raise NotProvenError(f"input {place} does not have its rows along axis {along}")
    weights = shape_of(call.input(1), "the weights")
    directions, hidden = weights[0], Size(int(call.attribute("hidden_size")))
    batch, steps = shape[axis], shape[1 - axis]

    def made(sizes: tuple[Size, ...], along: int) -> Tensor:
        return Tensor(sizes, None if rows is None else RowAxis(along, rows.outer, rows.inner))

    if flipped:
        state = made((batch, directions, hidden), 0)
        return (made((batch, steps, directions, hidden), 0), state, state)
    state = made((directions, batch, hidden), 1)
    return (made((steps, directions, batch, hidden), 2), state, state)
