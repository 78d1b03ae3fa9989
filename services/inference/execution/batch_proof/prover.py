"""Walks a graph in its order and tracks the rows through every node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx
from onnx import helper

from services.inference.execution.batch_proof.abstract_value import Content, RowAxis, Tensor, Unknown, Value
from services.inference.execution.batch_proof.control_flow import OPERATORS, ControlFlow, Scope
from services.inference.execution.batch_proof.operator_call import NotProvenError, OperatorCall
from services.inference.execution.batch_proof.rules import apply_rule, constant
from services.inference.execution.batch_proof.sizes import ROWS, Size, Symbols
from services.inference.execution.graph import RANDOM_OPERATORS, name_of
from services.runtime.verdict import YES, Verdict

# Limit for node visits. It bounds functions that call functions, and nested loops.
_MOST_NODES = 300_000
_DEEPEST = 32
# The exceptions raised by malformed nodes and constants.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# ONNX Runtime guarantees nothing for older opsets, which have other broadcast rules. There are no rules for newer ones.
_OPSETS = range(7, 27)
# Domains of built-in operators, besides Microsoft's. ONNX Runtime ignores a function named like a built-in operator.
_BUILT_IN = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training", "org.pytorch.aten")


def prove(model: onnx.ModelProto) -> Verdict:
    """Tries to prove that each output row depends only on its own row of the inputs. Weights may be in other files."""
    opsets = _opsets(model.opset_import)
    for version in (opsets, *({one.domain: one.version for one in f.opset_import} for f in model.functions)):
        if version.get("", _OPSETS[0]) not in _OPSETS:
            return Verdict(f"its operators are of opset {version['']}; rules are for {_OPSETS[0]} to {_OPSETS[-1]}")
    walk = Walk(model)
    scope = Scope(opsets=opsets)
    given = {one.name for one in model.graph.initializer}
    for one in model.graph.input:
        scope.values[one.name] = walk.graph_input(one, replaceable=one.name in given)
    try:
        outputs = walk.run(model.graph, scope)
    except _TooLargeError as error:
        return Verdict(str(error))
    except (*_MALFORMED, RecursionError) as error:
        return Verdict(f"its graph is not as ONNX defines it: {error}")
    for proto, value in zip(model.graph.output, outputs, strict=True):
        output = f"output {proto.name!r}"
        if isinstance(value, Unknown):
            return Verdict(value.reason)
        if value.rows is None:
            return Verdict(f"{output} has no rows of the inputs")
        if value.content is not Content.OWN:
            return Verdict(f"{output} depends on the number of the row")
        if value.rows != RowAxis(0):
            return Verdict(f"{output} has its rows along axis {value.rows.axis}, or several indices for a row")
    return YES


class _TooLargeError(Exception):
    """The graph exceeds the limit for node visits."""


class Walk:
    """One walk over a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.symbols = Symbols()
        self._opsets = _opsets(model.opset_import)
        self._functions = {(one.domain, one.name, one.overload): one for one in model.functions}
        self._nodes = 0

    def graph_input(self, proto: onnx.ValueInfoProto, *, replaceable: bool) -> Value:
        """The value of an input. Its rows lie along axis 0. A `replaceable` input, which has a default value in the
        graph, is the same in all batches."""
        tensor = proto.type.tensor_type
        if not tensor.HasField("shape") or (not replaceable and not tensor.shape.dim):
            return Tensor(None) if replaceable else Unknown(f"input {proto.name!r} has no first axis for the rows")
        sizes = [
            Size(dim.dim_value) if dim.HasField("dim_value") and dim.dim_value >= 0 else self.symbols.size()
            for dim in tensor.shape.dim
        ]
        return Tensor(tuple(sizes)) if replaceable else Tensor((ROWS, *sizes[1:]), RowAxis(0))

    def run(self, graph: onnx.GraphProto, scope: Scope) -> list[Value]:
        """Walks a graph and returns its outputs. `scope` has the values of the inputs."""
        for proto in graph.initializer:
            if proto.name not in scope.values:
                scope.values[proto.name] = constant(proto, self.symbols)
        for sparse in graph.sparse_initializer:
            scope.values[sparse.values.name] = Tensor(tuple(map(Size, sparse.dims)))
        self._run_nodes(graph.node, scope)
        return [scope.find(one.name) for one in graph.output]

    def _run_nodes(self, nodes: Sequence[onnx.NodeProto], scope: Scope) -> None:
        for node in nodes:
            self._nodes += 1
            if self._nodes > _MOST_NODES:
                raise _TooLargeError("its graph has too many nodes to be looked at")
            for name, value in zip(node.output, self._outputs(node, scope), strict=False):
                if name:
                    scope.values[name] = value

    def _outputs(self, node: onnx.NodeProto, scope: Scope) -> Sequence[Value]:
        inputs = [scope.find(name) if name else None for name in node.input]
        count = len(node.output)
        for value in inputs:
            if isinstance(value, Unknown):
                return [value] * count
        tensors = [value for value in inputs if value is None or isinstance(value, Tensor)]
        try:
            made = self._apply(node, tensors, scope)
        except NotProvenError as error:
            if all(tensor is None or tensor.independent for tensor in tensors) and not _graphs(node):
                # All inputs are the same in all batches, so the outputs are too.
                return [Tensor(None)] * count
            return [Unknown(f"{_name(node, scope)}: {error}")] * count
        except _MALFORMED as error:
            return [Unknown(f"{_name(node, scope)}: it is not as its operator is defined: {error}")] * count
        mixed = Unknown(f"{_name(node, scope)}: one of its outputs depends on several rows")
        return [*(mixed if value is None else value for value in made), *([mixed] * (count - len(made)))]

    def _apply(self, node: onnx.NodeProto, inputs: list[Tensor | None], scope: Scope) -> Sequence[Value | None]:
        """The outputs of a node; None for outputs whose rows mix. Raises NotProvenError, and _MALFORMED errors."""
        domain = _domain(node.domain)
        attributes = _attributes(node, scope.attributes)
        function = self._functions.get((node.domain, node.op_type, node.overload))
        if function is not None:
            self._check(function)
            return self._call(function, inputs, attributes, scope, node)
        if node.op_type in RANDOM_OPERATORS:
            return [Unknown(f"{_name(node, scope)}: it draws random numbers")] * len(node.output)
        opset = scope.opsets.get(domain, 1)
        call = OperatorCall(node.op_type, opset, inputs, attributes, len(node.output), self.symbols)
        if domain == "" and node.op_type in OPERATORS:
            node_id = (*scope.node_id, tuple(node.output))
            return ControlFlow(call, scope, self.run, _name(node, scope), node_id).outputs()
        if (made := apply_rule(name_of(node), call)) is not None:
            return made
        if (body := _standard_body(domain, node.op_type, opset)) is not None:
            return self._call(body, inputs, attributes, scope, node)
        raise NotProvenError("there is no rule for it")

    def _check(self, function: onnx.FunctionProto) -> None:
        """Raises NotProvenError if ONNX Runtime does not run the function as it is written."""
        if function.domain in _BUILT_IN or function.domain.startswith("com.microsoft"):
            raise NotProvenError("the model defines a function in a domain of operators")
        # ONNX Runtime runs the nodes of a function as those of the model's opset.
        for one in function.opset_import:
            if (ours := self._opsets.get(_domain(one.domain), one.version)) != one.version:
                raise NotProvenError(f"its function is of opset {one.version}, and the model of {ours}")

    def _call(
        self,
        function: onnx.FunctionProto,
        inputs: Sequence[Tensor | None],
        attributes: Mapping[str, Any],
        scope: Scope,
        node: onnx.NodeProto,
    ) -> Sequence[Value | None]:
        """Walks a function of the model, or the body of a standard operator. Raises NotProvenError."""
        if scope.depth >= _DEEPEST:
            raise NotProvenError("functions call each other too deeply")
        defaults = {one.name: helper.get_attribute_value(one) for one in function.attribute_proto}
        opsets = _opsets(function.opset_import)
        path, node_id = f"{_name(node, scope)}, ", (*scope.node_id, tuple(node.output))
        inner = Scope(opsets, {}, None, {**defaults, **attributes}, scope.depth + 1, path, node_id)
        for name, value in zip(function.input, inputs, strict=False):
            if value is not None:
                inner.values[name] = value
        missing = [name for name in function.input if name not in inner.values]
        self._run_nodes([_without(one, missing) for one in function.node], inner)
        return [inner.find(name) for name in function.output]


def _attributes(node: onnx.NodeProto, bound: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a node. `bound`: attributes of the function call, to which some refer."""
    made = {}
    for one in node.attribute:
        if not one.ref_attr_name:
            made[one.name] = helper.get_attribute_value(one)
        elif one.ref_attr_name in bound:
            made[one.name] = bound[one.ref_attr_name]
    return made


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """Versions by domain. As in ONNX Runtime, the last import of a domain counts."""
    return {_domain(one.domain): one.version for one in imports}


def _graphs(node: onnx.NodeProto) -> bool:
    return any(one.HasField("g") or one.graphs for one in node.attribute)


def _name(node: onnx.NodeProto, scope: Scope) -> str:
    name = node.name or next((name for name in node.output if name), "")
    return f"{scope.path}node {name!r} ({node.op_type})"


def _without(node: onnx.NodeProto, names: Sequence[str]) -> onnx.NodeProto:
    """The node without inputs that the call of its function leaves out."""
    if not any(name in node.input for name in names):
        return node
    made = onnx.NodeProto()
    made.CopyFrom(node)
    made.input[:] = ["" if name in names else name for name in node.input]
    return made


def _standard_body(domain: str, operator: str, opset: int) -> onnx.FunctionProto | None:
    """The function body of an operator in the standard; None if there is none, or only for some types."""
    try:
        body: onnx.FunctionProto = onnx.defs.get_schema(operator, opset, domain).function_body
    except onnx.defs.SchemaError:
        return None
    return body if body.node else None
