"""RNN, GRU and LSTM, whose rows lie along axis 1 unless `layout` is 1."""

from __future__ import annotations

from services.inference.execution.batch_proof.abstract_value import Tensor
from services.inference.execution.batch_proof.operator_call import NotProvenError, OperatorCall
from services.inference.execution.batch_proof.registry import Outcome, rule
from services.inference.execution.batch_proof.sizes import Size


@rule("RNN", "GRU", "LSTM")
def recurrent(call: OperatorCall) -> Outcome:
    """Steps along one axis of the input. Each row has its own state."""
    flipped = bool(call.attribute("layout", 0))
    axis = 0 if flipped else 1
    shape, rows = call.shape(0), call.rows
    call.batch_independent(1, 2, 3, 7)
    if rows is None:
        call.batch_independent_except()
    elif rows.axis != axis:
        raise NotProvenError(f"it takes axis {rows.axis}, along which the rows lie, for steps or features")
    for index, along in ((4, 0), (5, axis), (6, axis)):
        state = call.maybe(index)
        if rows is not None and state is not None and state.rows != rows.at(along):
            raise NotProvenError(f"input {index} does not have its rows along axis {along}")
    directions, hidden = call.shape(1)[0], Size(int(call.attribute("hidden_size")))
    batch, steps = shape[axis], shape[1 - axis]

    def made(along: int, *sizes: Size) -> Tensor:
        return Tensor(sizes, None if rows is None else rows.at(along))

    if flipped:
        state = made(0, batch, directions, hidden)
        return (made(0, batch, steps, directions, hidden), state, state)
    state = made(1, directions, batch, hidden)
    return (made(2, steps, directions, batch, hidden), state, state)
