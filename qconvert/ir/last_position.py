"""Logits for the last token of each row alone: an option of decoders, which saves the head's work on the rest of a prompt.

The graph that ships has the nodes; what compares all positions takes them out again.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
from onnx_ir import DataType, Node, Value

from qconvert.ir.artifact import INPUT_KEY
from qconvert.ir.template import DOMAIN

NAME = "qconvert/last_position"


def keep_last_position(graph: onnx_ir.Graph, head: str) -> None:
    """Let the linear `head` of a decoder's template read only the last token of each row, in place: logits [batch, 1, out].

    Rows are padded on the right. A row that ended before the tokens of this run gives its first one.
    """
    node = next(node for node in graph if node.domain == DOMAIN and "module" in node.attributes and _module(node) == head)
    hidden = node.inputs[0]
    attention = next(each for each in graph if each.op_type == "GroupQueryAttention")
    assert hidden is not None
    assert hidden.shape is not None
    last_token, total = attention.inputs[5:7]  # index of each row's last token, and length of the longest row, caches included
    nodes: list[Node] = []

    def op(op_type: str, inputs: list[Value | None], name: str, **attributes: int) -> Value:
        nodes.append(onnx_ir.node(op_type, inputs, attributes, name=name))
        made = nodes[-1].outputs[0]
        made.name, made.type = name, onnx_ir.TensorType(DataType.INT64)
        return made

    def constant(name: str, value: list[int]) -> Value:
        tensor = onnx_ir.tensor(np.array(value, np.int64), name=name)
        shape, kind = onnx_ir.Shape([len(value)]), onnx_ir.TensorType(tensor.dtype)
        made = Value(name=name, shape=shape, type=kind, const_value=tensor)
        graph.register_initializer(made)
        return made

    ids = next(value for value in graph.inputs if value.name == "input_ids")
    read_now = op("Shape", [ids], f"{NAME}/sequence", start=1, end=2)
    before = op("Sub", [op("Cast", [total], f"{NAME}/total", to=DataType.INT64), read_now], f"{NAME}/past")
    position = op("Sub", [op("Cast", [last_token], f"{NAME}/last_token", to=DataType.INT64), before], f"{NAME}/position")
    within = op("Max", [position, constant(f"{NAME}/first", [0])], f"{NAME}/within")
    indices = op("Unsqueeze", [within, constant(f"{NAME}/axes", [1, 2])], f"{NAME}/indices")
    kept = op("GatherND", [hidden, indices], NAME, batch_dims=1)
    kept.type = hidden.type
    graph.insert_before(node, nodes)
    node.replace_input_with(0, kept)
    kept.shape = hidden.shape
    _set_length(kept, hidden.shape[1], 1)


def keeps_last_position(graph: onnx_ir.Graph) -> bool:
    return any(node.name == NAME for node in graph)


def restore_all_positions(graph: onnx_ir.Graph) -> None:
    """Undo `keep_last_position` in a lowered graph, in place."""
    for node in list(graph):
        if node.name == NAME:
            hidden, kept = node.inputs[0], node.outputs[0]
            assert hidden is not None
            assert hidden.shape is not None
            _set_length(kept, 1, hidden.shape[1])
            for reader in graph:  # a layer with int8 activations names its input (ir/artifact.py)
                if reader.metadata_props.get(INPUT_KEY) == kept.name:
                    reader.metadata_props[INPUT_KEY] = str(hidden.name)
            onnx_ir.convenience.replace_all_uses_with(kept, hidden)
            graph.remove(node, safe=True)


def _module(node: Node) -> str:
    return node.attributes["module"].as_string()


def _set_length(value: Value, old: int | onnx_ir.SymbolicDim, new: int | onnx_ir.SymbolicDim) -> None:
    """Change the second of three dimensions, of `value` and of all that is computed from it in that shape."""
    if value.shape is None or len(value.shape) != 3 or value.shape[1] != old:
        return
    value.shape = onnx_ir.Shape([value.shape[0], new, value.shape[2]])
    for node, _ in value.uses():
        for output in node.outputs:
            _set_length(output, old, new)
