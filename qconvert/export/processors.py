"""The graph asks the processor that it is loaded on which weights its integer products want: signed or unsigned ones.

Signed weights are fast with VNNI and AMX and saturate on AVX2 alone; unsigned ones are exact everywhere and have no fast kernel
with VNNI (ir/integer_products.py). So every such product is there twice, in the branches of an `If`:

    exact    = ReduceMin(MatMulInteger(255s, 127s)) == what it must be     once per graph, from constants
    signed   = If(exact): the signed weights, else nothing                 once per graph, all weights
    y        = If(exact): MatMulIntegerToFloat(x, Transpose(signed))
               else:      MatMulIntegerToFloat(x, Transpose(unsigned ^ 128), zero point 128)

ONNX Runtime folds what depends on constants alone when it creates a session, on the machine that runs it and by the kernels in
question. An `If` whose condition is then a constant is replaced by the branch that is taken. So nothing of this is left to run,
and both forms read the same bytes: `w ^ 128` as unsigned byte is the signed `w` plus 128, which the zero point takes off again.

Branches are folded before it is known which is taken, and a copy of every weight would be made for nothing. But what has
no shape yet is left for later. Hence the first `If`: its branches give the weights, or an empty value of another rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir
from onnx_ir import DataType, ExternalTensor, Graph, Node, TensorType, Value

from qconvert.export.graph import GraphBuilder
from qconvert.ir.integer_products import PRODUCTS, S8, U8

EXACT = "qconvert/signed_products_are_exact"
SELECT = "qconvert/weights_for_processor"
# Rows, width and columns of the product that is tried: enough for the kernels that take several rows at once.
PROBE = (16, 64, 16)
HIGHEST_BIT = 128
WEIGHT, WEIGHT_ZERO_POINT = 1, 5  # inputs of MatMulIntegerToFloat

# Initializer -> the value that stands for it.
Views = Callable[[Value], Value]


def choose_by_processor(graph: Graph, builder: GraphBuilder) -> None:
    """Let the graph choose the weights of every MatMulIntegerToFloat with signed ones, in place, when it is loaded.

    Raises TypeError for any other integer product that is not exact on every processor.
    """
    products = [node for node in graph if not _is_exact(node)]
    for node in products:
        if node.op_type != "MatMulIntegerToFloat":
            kinds = " by ".join(str(kind) for kind in _operands(node))
            raise TypeError(f"{node.name}: {node.op_type} of {kinds} is not exact on every processor, and has no other form")
    if products:
        chooser = _Chooser(builder, dict.fromkeys(leaf for node in products for leaf in _leaves(node.inputs[WEIGHT])))
        graph.insert_before(graph[0], builder.take_nodes())
        for node in products:
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


def _leaves(value: Value | None) -> Iterable[Value]:
    """The initializers that a weight is made of, by Transpose and Concat."""
    assert value is not None
    if value.is_initializer():
        yield value
    else:
        node = value.producer()
        assert node is not None
        for each in node.inputs:
            yield from _leaves(each)


class _Chooser:
    """Adds the probe and the choice of weights to `builder`, and then makes one choice of product after the other.

    leaves: the int8 initializers that weights are made of.
    """

    def __init__(self, builder: GraphBuilder, leaves: Iterable[Value]) -> None:
        self.builder = builder
        self.highest_bit = builder.constant("qconvert/highest_bit", np.array(HIGHEST_BIT, np.uint8))
        self.exact = self._probe()
        signed = {leaf: _view(leaf, S8, f"{leaf.name}/signed") for leaf in leaves}
        nothing = [_constant(f"{leaf.name}/nothing", np.array([], np.int8)) for leaf in signed]
        bit = _constant("qconvert/highest_bit/flipped", np.array(HIGHEST_BIT, np.uint8))
        no_bit = _constant("qconvert/highest_bit/nothing", np.array([], np.uint8))
        flipped, *selected = self._either(
            SELECT,
            Graph([], [no_bit, *signed.values()], nodes=[], initializers=[no_bit, *signed.values()], name=f"{SELECT}/signed"),
            Graph([], [bit, *nothing], nodes=[], initializers=[bit, *nothing], name=f"{SELECT}/unsigned"),
        )
        self.flipped_bit = flipped  # the highest bit, known only where weights are to be unsigned
        self.signed = dict(zip(signed, selected, strict=True))

    def _probe(self) -> Value:
        rows, width, columns = PROBE
        factors = np.full((rows, width), 255, np.uint8), np.full((width, columns), 127, np.int8)
        largest = [self.builder.constant(f"{EXACT}/factor_{index}", factor) for index, factor in enumerate(factors)]
        product = self.builder.op("MatMulInteger", largest, f"{EXACT}/product")
        smallest = self.builder.op("ReduceMin", [product], f"{EXACT}/smallest", keepdims=0)
        expected = self.builder.constant(f"{EXACT}/expected", np.array(255 * 127 * width, np.int32))
        exact = self.builder.op("Equal", [smallest, expected], EXACT)
        exact.name = EXACT
        return exact

    def _either(self, name: str, signed: Graph, unsigned: Graph) -> list[Value]:
        attributes = {"then_branch": signed, "else_branch": unsigned}
        node = onnx_ir.node("If", [self.exact], attributes, num_outputs=len(signed.outputs), name=name)
        for index, (output, like) in enumerate(zip(node.outputs, signed.outputs, strict=True)):
            output.name, output.type = f"{name}/{index}", like.type
        self.builder.nodes.append(node)
        return list(node.outputs)

    def chosen(self, product: Node) -> list[Node]:
        """The nodes that take the place of `product`, and give its output."""
        signed = self._branch(product, f"{product.name}/signed", self.signed.__getitem__, None)
        unsigned = self._branch(product, f"{product.name}/unsigned", self._unsigned, self.flipped_bit)
        (output,) = self._either(f"{product.name}/by_processor", signed, unsigned)
        old = product.outputs[0]
        output.shape, output.name, old.name = old.shape, old.name, f"{old.name}/before"
        onnx_ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        return self.builder.take_nodes()

    def _branch(self, product: Node, name: str, view: Views, flipped_bit: Value | None) -> Graph:
        """The product over what `view` gives for the initializers of its weight. flipped_bit: None for signed weights."""
        builder, inputs = GraphBuilder(self.builder.graph, {}), list(product.inputs)
        inputs[WEIGHT] = _rebuilt(inputs[WEIGHT], name, view, builder, flipped_bit)
        if flipped_bit is not None:
            inputs += [None] * (WEIGHT_ZERO_POINT + 1 - len(inputs))
            symmetric, zero_point = inputs[WEIGHT_ZERO_POINT] is None, inputs[WEIGHT_ZERO_POINT]
            inputs[WEIGHT_ZERO_POINT] = (
                self.highest_bit if symmetric else _rebuilt(zero_point, f"{name}/zero_point", view, builder, self.highest_bit)
            )
        output = builder.op(product.op_type, inputs, name, product.domain)
        output.type = TensorType(DataType.FLOAT)
        nodes = builder.take_nodes()
        for node in nodes:
            node.outputs[0].name = f"{node.name}/value"  # in a branch, unlike any name outside
        return Graph([], [output], nodes=nodes, name=name)

    def _unsigned(self, leaf: Value) -> Value:
        """The bytes of a signed initializer as unsigned ones, in the outer graph."""
        name = f"{leaf.name}/unsigned"
        graph = self.builder.graph
        if name not in graph.initializers:
            graph.register_initializer(_view(leaf, U8, name))
        return graph.initializers[name]


def _rebuilt(value: Value | None, name: str, view: Views, builder: GraphBuilder, flipped_bit: Value | None) -> Value:
    """What is made of initializers by Concat and Transpose, from other views on them; their highest bit flipped, if asked."""
    assert value is not None
    node = value.producer()
    if node is not None and node.op_type == "Transpose":
        inner = _rebuilt(node.inputs[0], name, view, builder, flipped_bit)
        return builder.op("Transpose", [inner], f"{name}/transpose", perm=[1, 0])
    bytes_ = (
        view(value)
        if node is None
        else builder.op(
            "Concat", [view(leaf) for leaf in _leaves(value)], f"{name}/concat", axis=node.attributes["axis"].as_int()
        )
    )
    return bytes_ if flipped_bit is None else builder.op("BitwiseXor", [bytes_, flipped_bit], f"{name}/flip")


def _view(initializer: Value, dtype: DataType, name: str) -> Value:
    """Another initializer on the bytes of an external one."""
    tensor = initializer.const_value
    assert isinstance(tensor, ExternalTensor)
    view = ExternalTensor(tensor.location, tensor.offset, tensor.length, dtype, shape=tensor.shape, name=name)
    return Value(name=name, shape=view.shape, type=TensorType(dtype), const_value=view)


def _constant(name: str, array: np.ndarray) -> Value:
    tensor = onnx_ir.tensor(array, name=name)
    return Value(name=name, shape=onnx_ir.Shape(array.shape), type=TensorType(tensor.dtype), const_value=tensor)
