"""Linears that read the same rows become one, over the same bytes.

Query, key and value: GroupQueryAttention takes them as one tensor. Gate and up: one product is cut in two. For one token that
is faster (SmolLM2: 4 to 6 % of a decoding step), for many rows the cut costs what the product saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir
from onnx_ir import Node, Value

from qconvert.export.graph import GraphBuilder
from qconvert.ir.artifact import INPUT_KEY, LAYER_KEY, LAYER_SEPARATOR

# Products whose weights have the output channels as their first axis.
CHANNELS_FIRST = ("MatMulNBits", "MatMulBnb4")

# Ops on one weight; a second input, as BitwiseXor has, is the same for all of them.
FOLDED = ("BitwiseXor", "Cast", "Transpose")


def pack_query_key_value(graph: onnx_ir.Graph, builder: GraphBuilder) -> None:
    """Replace the linears of query, key and value by one, wherever all three are lowered alike and read the same rows."""
    for attention in [node for node in graph if node.op_type == "GroupQueryAttention"]:
        values = attention.inputs[:3]
        if None in values or not all(_used_once(value) for value in values):
            continue
        packed = _joined([value for value in values if value is not None], builder)
        nodes = builder.take_nodes()
        if packed is not None:
            graph.insert_before(attention, nodes)
            attention.replace_input_with(0, packed)
            attention.replace_input_with(1, None)
            attention.replace_input_with(2, None)


def pack_shared_inputs(graph: onnx_ir.Graph, builder: GraphBuilder, groups: Iterable[Sequence[Value]]) -> None:
    """Replace the linears that make the values of a group [..., channels] by one and a Split, where they are lowered alike.

    groups: outputs of linears that read the same rows; those that nothing reads any more are left alone.
    """
    for values in groups:
        first = values[0].producer() if len(values) > 1 else None
        if first is None or not all(value.uses() for value in values):
            continue
        sizes = [value.shape[-1] if value.shape is not None else None for value in values]
        packed = _joined(list(values), builder)
        nodes = builder.take_nodes()
        if packed is None or not all(isinstance(size, int) for size in sizes):
            continue
        name = LAYER_SEPARATOR.join(str(value.name) for value in values)
        lengths = builder.constant(f"{name}/sizes", np.array(sizes, np.int64))
        split = onnx_ir.node("Split", [packed, lengths], {"axis": -1}, num_outputs=len(values), name=f"{name}/Split")
        graph.insert_before(first, [*nodes, split])
        for old, new in zip(values, split.outputs, strict=True):
            new.shape, new.type = old.shape, old.type
            new.name, old.name = old.name, f"{old.name}/apart"
            onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _joined(values: list[Value], builder: GraphBuilder) -> Value | None:
    """One value [..., sum of channels] instead of several [..., channels], or None where they are not computed alike."""
    nodes = [value.producer() for value in values]
    first = nodes[0]
    if first is None or any(node is None or not _alike(first, node) for node in nodes):
        return None
    made = [node for node in nodes if node is not None]
    inputs: list[Value | None] | None = None
    if first.op_type in (*CHANNELS_FIRST, "MatMulIntegerToFloat", "MatMul"):
        inputs = _product_inputs(made, builder)
    elif first.op_type == "Mul" and len({node.inputs[1] for node in made}) == 1:
        inputs = _with(_operand(made, 0, builder), made[0].inputs[1])
    elif first.op_type == "Add":
        added = _weights([node.inputs[1] for node in made], -1, builder) or _operand(made, 1, builder)
        inputs = _with(_operand(made, 0, builder), added)
    return None if inputs is None else _node(made, inputs, builder)


def _operand(nodes: Sequence[Node], index: int, builder: GraphBuilder) -> Value | None:
    values = [node.inputs[index] for node in nodes]
    if not all(_used_once(value) for value in values):
        return None
    return _joined([value for value in values if value is not None], builder)


def _with(left: Value | None, right: Value | None) -> list[Value | None] | None:
    return None if left is None or right is None else [left, right]


def _product_inputs(nodes: Sequence[Node], builder: GraphBuilder) -> list[Value | None] | None:
    """Inputs that are the same stay, the others are joined along the output channels; None where one can't be."""
    channels_last = nodes[0].op_type not in CHANNELS_FIRST
    joined: list[Value | None] = []
    for index, value in enumerate(nodes[0].inputs):
        others = [node.inputs[index] for node in nodes]
        if index == 0 or len(set(others)) == 1:
            if len(set(others)) > 1:
                return None
            joined.append(value)
            continue
        value = _weights(others, -1 if channels_last else 0, builder)
        if value is None:
            return None
        joined.append(value)
    return joined


def _weights(values: Sequence[Value | None], axis: int, builder: GraphBuilder) -> Value | None:
    """Initializers, or what folds when the model is loaded (FOLDED ops of them), joined along `axis`."""
    given = [value for value in values if value is not None]
    if len(given) < len(values):
        return None
    if all(isinstance(value.const_value, onnx_ir.ExternalTensor) for value in given):
        one_dimensional = given[0].shape is not None and len(given[0].shape) == 1
        return builder.spanning(given, 0 if one_dimensional else axis)
    nodes = [node for value in given if (node := value.producer()) is not None]
    if len(nodes) < len(given) or nodes[0].op_type not in FOLDED or not all(_alike(nodes[0], n) for n in nodes):
        return None
    if nodes[0].op_type == "Transpose":
        axis = 0 if axis == -1 else -1
    joined = _weights([node.inputs[0] for node in nodes], axis, builder)
    return None if joined is None else _node(nodes, [joined, *nodes[0].inputs[1:]], builder)


def _node(nodes: Sequence[Node], inputs: list[Value | None], builder: GraphBuilder) -> Value:
    """A node like the first of `nodes` that gives the channels of all of them."""
    first = nodes[0]
    attributes = dict(first.attributes)
    if "N" in attributes:
        attributes["N"] = onnx_ir.AttrInt64("N", sum(node.attributes["N"].as_int() for node in nodes))
    name = LAYER_SEPARATOR.join(str(node.name) for node in nodes)
    node = Node(first.domain, first.op_type, inputs, list(attributes.values()), name=name)
    if LAYER_KEY in first.metadata_props:
        node.metadata_props[LAYER_KEY] = LAYER_SEPARATOR.join(node.metadata_props[LAYER_KEY] for node in nodes)
        node.metadata_props[INPUT_KEY] = first.metadata_props[INPUT_KEY]
    output, like = node.outputs[0], first.outputs[0]
    output.type = like.type
    builder.nodes.append(node)
    return output


def _alike(first: Node, other: Node) -> bool:
    """Return whether two nodes do the same to their inputs."""
    if (first.domain, first.op_type, len(first.inputs)) != (other.domain, other.op_type, len(other.inputs)):
        return False
    return _settings(first) == _settings(other)


def _settings(node: Node) -> dict[str, object]:
    return {name: attribute.value for name, attribute in node.attributes.items() if name != "N"}


def _used_once(value: Value | None) -> bool:
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()
