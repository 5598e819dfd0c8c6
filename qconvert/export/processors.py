"""The graph asks the processor that it is loaded on which weights its integer products want: signed or unsigned ones.

Signed weights are fast with VNNI and AMX and saturate on AVX2 alone; unsigned ones are exact everywhere and have no fast kernel
with VNNI (graph/integer_products.py). So every such product is there twice, in the branches of an `If`:

    exact  = ReduceMin(MatMulInteger(255s, 127s)) == what it must be      once per graph, from constants
    y      = If(exact): MatMulIntegerToFloat(x, Transpose(signed))
             else:      MatMulIntegerToFloat(x, Transpose(unsigned ^ bit), zero point 128)

ONNX Runtime folds what depends on constants alone when it creates a session, on the machine that runs it and by the kernels in
question. An `If` whose condition is then a constant is replaced by the branch that is taken. So nothing of this is left to run,
and both forms read the same bytes: `w ^ 128` as unsigned byte is the signed `w` plus 128, which the zero point takes off again.

The insides of a branch are folded before it is known whether it is taken, which would make a copy of every weight for nothing.
But what has no shape yet is left for later. So `bit`, which is 128, comes from an `If` of its own, whose branches give it in
different ranks. Signed weights are transposed outside of the branches, which costs nothing where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir
from onnx_ir import DataType, Graph, Node, TensorType, Value

from qconvert.export.graph import GraphBuilder
from qconvert.graph.integer_products import PROBE, PROBE_SUM, PRODUCTS, U8
from qconvert.graph.values import constant, giving

EXACT = "qconvert/signed_products_are_exact"
FLIPPED = "qconvert/flipped_bit"
HIGHEST_BIT = 128
# Inputs of the nodes that are chosen: (weight, its zero point).
PLACES = {"MatMulIntegerToFloat": (1, 5), "DequantizeLinear": (0, 2)}


def choose_by_processor(graph: Graph, builder: GraphBuilder, weights: Sequence[Node] = ()) -> None:
    """Let the graph choose the weights of every MatMulIntegerToFloat with signed ones, in place, when it is loaded.

    weights: of the nodes that dequantize weights, those that ONNX Runtime makes an integer product of.

    Raises TypeError for any other integer product that is not exact on every processor.
    """
    products = [node for node in graph if not _is_exact(node)]
    for node in products:
        if node.op_type != "MatMulIntegerToFloat":
            kinds = " by ".join(str(kind) for kind in _operands(node))
            raise TypeError(f"{node.name}: {node.op_type} of {kinds} is not exact on every processor, and has no other form")
    if products or weights:
        chooser = _Chooser(builder)
        graph.insert_before(graph[0], builder.take_nodes())
        for node in (*products, *weights):
            graph.insert_before(node, chooser.chosen(node))
            graph.remove(node, safe=True)


def _is_exact(node: Node) -> bool:
    return node.op_type not in PRODUCTS or _operands(node) in PRODUCTS[node.op_type].exact


def _operands(node: Node) -> tuple[DataType, DataType]:
    """Types of the activations and of the weights that an integer product multiplies."""
    product = PRODUCTS[node.op_type]
    activations = _type_of(node.inputs[product.activations])
    return (U8 if activations == DataType.FLOAT else activations, _type_of(node.inputs[product.weights]))


def _type_of(value: Value | None) -> DataType:
    assert value is not None
    if value.dtype is not None:
        return value.dtype
    node = value.producer()
    assert node is not None, value.name
    return _type_of(node.inputs[2 if node.op_type == "QuantizeLinear" else 0])  # the others here give what they take


def signed_products_are_exact(builder: GraphBuilder) -> Value:
    """Return whether the processor at hand multiplies unsigned by signed bytes exactly: a bool, which folds.

    The nodes that try it are added, unless the graph has them.
    """
    for node in builder.graph:
        if node.name == EXACT:
            return node.outputs[0]
    largest = [builder.constant(f"{EXACT}/factor_{index}", factor) for index, factor in enumerate(PROBE)]
    product = builder.op("MatMulInteger", largest, f"{EXACT}/product")
    smallest = builder.op("ReduceMin", [product], f"{EXACT}/smallest", keepdims=0)
    expected = builder.constant(f"{EXACT}/expected", np.array(PROBE_SUM, np.int32))
    exact = builder.op("Equal", [smallest, expected], EXACT)
    exact.name = EXACT
    return exact


class _Chooser:
    """A probe of the processor in the graph of `builder`, by whose answer one product after the other is chosen."""

    def __init__(self, builder: GraphBuilder) -> None:
        self.builder = builder
        self.highest_bit = builder.constant("qconvert/highest_bit", np.array(HIGHEST_BIT, np.uint8))
        self.exact = signed_products_are_exact(builder)
        row = constant(f"{FLIPPED}/row", np.array([HIGHEST_BIT], np.uint8))
        bit = constant(f"{FLIPPED}/bit", np.array(HIGHEST_BIT, np.uint8))
        self.flipped_bit = self._either(FLIPPED, giving(row, f"{FLIPPED}/signed"), giving(bit, f"{FLIPPED}/unsigned"))

    def _either(self, name: str, signed: Graph, unsigned: Graph) -> Value:
        node = onnx_ir.node("If", [self.exact], {"then_branch": signed, "else_branch": unsigned}, name=name)
        node.outputs[0].type = signed.outputs[0].type
        self.builder.nodes.append(node)
        return node.outputs[0]

    def chosen(self, product: Node) -> list[Node]:
        """The nodes that take the place of `product`, and give its output."""
        signed = _branch(product, list(product.inputs), f"{product.name}/signed")
        unsigned = self._unsigned_branch(product, f"{product.name}/unsigned")
        output = self._either(f"{product.name}/by_processor", signed, unsigned)
        old = product.outputs[0]
        output.shape, output.name, old.name = old.shape, old.name, f"{old.name}/before"
        onnx_ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        return self.builder.take_nodes()

    def _unsigned_branch(self, product: Node, name: str) -> Graph:
        inputs, builder = list(product.inputs), GraphBuilder(self.builder.graph, {})
        place, zero_place = PLACES[product.op_type]
        stored, transposed = _stored(inputs[place])
        flipped = builder.op("BitwiseXor", [self._unsigned(stored, builder, name), self.flipped_bit], f"{name}/flip")
        inputs[place] = builder.op("Transpose", [flipped], f"{name}/transpose", perm=[1, 0]) if transposed else flipped
        zero_points = inputs[zero_place] if len(inputs) > zero_place else None
        if zero_points is None:
            inputs.append(self.highest_bit)
        elif isinstance(zero_points.const_value, onnx_ir.ExternalTensor) or zero_points.producer():
            unsigned = self._unsigned(zero_points, builder, f"{name}/zero_point")
            inputs[zero_place] = builder.op("BitwiseXor", [unsigned, self.highest_bit], f"{name}/zero_point/flip")
        else:
            assert zero_points.shape is not None
            inputs[zero_place] = self.builder.repeated(np.uint8(HIGHEST_BIT), zero_points.shape.numpy()[0])
        return _branch(product, inputs, name, builder.take_nodes())

    def _unsigned(self, value: Value | None, builder: GraphBuilder, name: str) -> Value:
        """The bytes of a signed external initializer, or of several that are joined, as unsigned ones."""
        assert value is not None
        node = value.producer()
        if node is None:
            return self._view(value)
        assert node.op_type == "Concat"
        joined = [self._view(each) for each in node.inputs if each is not None]
        return builder.op("Concat", joined, f"{name}/concat", axis=node.attributes["axis"].as_int())

    def _view(self, initializer: Value) -> Value:
        """The bytes of a signed external initializer as unsigned ones, in the outer graph."""
        return self.builder.view(initializer, U8, f"{initializer.name}/unsigned")


def _branch(product: Node, inputs: list[Value | None], name: str, before: Sequence[Node] = ()) -> Graph:
    """A graph of the product on other inputs, after the nodes that make them."""
    node = Node(product.domain, product.op_type, inputs, list(product.attributes.values()), name=name)
    node.outputs[0].type = TensorType(DataType.FLOAT)
    nodes = [*before, node]
    for each in nodes:
        each.outputs[0].name = f"{each.name}/value"  # in a branch, unlike any name outside
    return Graph([], node.outputs, nodes=nodes, name=name)


def _stored(weight: Value | None) -> tuple[Value | None, bool]:
    """(the stored weight, whether it is its Transpose that is taken)."""
    node = weight.producer() if weight is not None else None
    if node is None:
        return weight, False
    assert node.op_type == "Transpose"
    return node.inputs[0], True
