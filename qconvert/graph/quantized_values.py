"""The values of a graph that are quantized where layers have static activations: what to calibrate, and what reads codes.

A value is written as codes and read from them by a pair of QuantizeLinear and DequantizeLinear. ONNX Runtime then runs what
lies between such pairs on the codes themselves (QLinearConv, QGemm, QLinearAdd, ...), and drops the pairs. So what counts is
that pairs lie where its kernels want them, and nowhere else, since each loses something:

- what goes into a static layer;
- what comes out of a static convolution, or of the activation function behind it, which the codes' range then cuts off: a
  convolution has no kernel that takes codes and gives floats. A linear layer has one, and so its output stays float unless
  integer kernels read it;
- what comes out of the operators of FLOWS, if all that goes in is in codes and something behind them wants codes;
- what comes out of the operators of PASSES: they move codes, and so what they give has the range of what they take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx_ir import DataType, Graph, Node, Value

from qconvert.ir.template import DOMAIN, module_of

# Operators that move values and compute none, with the data as first input.
MOVES = frozenset({"DepthToSpace", "Flatten", "Gather", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
# The same, and what chooses among values: fast on codes behind a convolution (NhwcMaxPool).
PASSES = MOVES | {"MaxPool"}
# Operators with an integer kernel in ONNX Runtime's CPU provider.
FLOWS = frozenset({"Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid"})
# Activation functions that cut off: a range does the same.
CUTS = frozenset({"Clip", "Relu"})

IsStatic = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class QuantizedValue:
    """A value that is quantized.

    root: the value whose range it has, which is itself unless it was only moved.
    readers: the nodes that read its codes; None where everything does.
    layers: names of the static layers that read them.
    """

    value: Value
    root: Value
    readers: tuple[Node, ...] | None
    layers: tuple[str, ...]


def quantized_values(graph: Graph, is_static: IsStatic) -> list[QuantizedValue]:
    """Return the quantized values of a template's graph, in the order in which they are made.

    is_static: whether a layer, by the name of its module, has static activations.
    """
    return _Flow(graph, is_static).found()


class _Flow:
    def __init__(self, graph: Graph, is_static: IsStatic) -> None:
        self.graph = graph
        self.layers = {node for node in graph if is_opaque_product(node) and is_static(module_of(node))}
        self.required = self._leading_to_layers(MOVES)
        self.wanted = self._leading_to_layers(PASSES | FLOWS | CUTS)
        self.roots: dict[Value, Value] = {}

    def found(self) -> list[QuantizedValue]:
        values = [*self.graph.inputs, *(output for node in self.graph for output in node.outputs)]
        found = []
        for value in values:
            root = self._root(value)
            if root is not None:
                self.roots[value] = root
                found.append(value)
        return [QuantizedValue(value, self.roots[value], self._readers(value), self._layers(value)) for value in found]

    def _leading_to_layers(self, through: frozenset[str]) -> set[Value]:
        """Values that static layers read, or operators of `through` on the way there."""
        values = set[Value]()
        for node in reversed(self.graph):
            if node in self.layers or (_is_one_of(node, through) and node.outputs[0] in values):
                values.update(_data(node))
        return values

    def _root(self, value: Value) -> Value | None:
        """The value whose range `value` has; None where it stays float."""
        node = value.producer()
        if node is not None:
            if _is_one_of(node, PASSES) and value in self.wanted and node.inputs[0] in self.roots:
                return self.roots[node.inputs[0]]
            if self._gives_codes(node, value) and not self._is_cut(value):
                return value
        return value if value in self.required and value.dtype in (None, DataType.FLOAT) else None

    def _gives_codes(self, node: Node, value: Value) -> bool:
        """Whether the operator that makes a value computes it in codes."""
        if _is_one_of(node, CUTS) and node.inputs[0] is not None and self._is_cut(node.inputs[0]):
            before = node.inputs[0].producer()
            return before is not None and self._gives_codes(before, value)
        if node in self.layers:
            return node.op_type == "Conv" or (value in self.wanted and self._is_matrix(node))
        return _is_one_of(node, FLOWS) and value in self.wanted and all(each in self.roots for each in _data(node))

    def _is_matrix(self, node: Node) -> bool:
        """Whether a linear layer reads rows [n, in], so that it has a kernel which gives codes (QGemm)."""
        x = node.inputs[0]
        return x is not None and x.shape is not None and len(x.shape) == 2

    def _is_cut(self, value: Value) -> bool:
        """Whether an activation function that cuts off is all that reads a value."""
        uses = list(value.uses())
        return len(uses) == 1 and _is_one_of(uses[0].node, CUTS) and not value.is_graph_output()

    def _readers(self, value: Value) -> tuple[Node, ...] | None:
        node = value.producer()
        if node is not None and (self.roots[value] is not value or self._gives_codes(node, value)):
            return None
        return tuple(dict.fromkeys(use.node for use in value.uses() if self._reads_codes(use.node)))

    def _layers(self, value: Value) -> tuple[str, ...]:
        nodes = dict.fromkeys(use.node for use in value.uses())
        return tuple(module_of(node) for node in nodes if node in self.layers and node.inputs[0] is value)

    def _reads_codes(self, node: Node) -> bool:
        outputs_codes = node.outputs[0] in self.roots
        return node in self.layers or (outputs_codes and _is_one_of(node, PASSES | FLOWS))


def is_opaque_product(node: Node) -> bool:
    """Return whether a node stands for a linear layer or a convolution."""
    return node.domain == DOMAIN and node.op_type in ("Conv", "Linear")


def _is_one_of(node: Node, operators: frozenset[str]) -> bool:
    return node.domain == "" and node.op_type in operators


def _data(node: Node) -> list[Value]:
    """The values that a node computes with, without indices and shapes."""
    inputs = [value for value in node.inputs if value is not None]
    return inputs if _is_one_of(node, FLOWS) else inputs[:1]
