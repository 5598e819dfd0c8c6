"""Logits for the last token of each row alone: an option of decoders, which saves the head's work on the rest of a prompt.

The graph that ships has the nodes; what compares all positions takes them out again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir
from onnx_ir import DataType, Node, Value

from qconvert.graph.phases import bodies_of
from qconvert.graph.values import added_constant, input_named
from qconvert.ir.artifact import INPUT_KEY
from qconvert.ir.template import DOMAIN, module_of

NAME = "qconvert/last_position"
TO_THE_END = np.iinfo(np.int64).max


def keep_last_position(graph: onnx_ir.Graph, head: str) -> None:
    """Let the linear `head` of a decoder's template read only the last token of each row, in place: logits [batch, 1, out].

    A row without a token in this run gives its first position.
    """
    node = next(node for node in graph if node.domain == DOMAIN and "module" in node.attributes and module_of(node) == head)
    hidden = node.inputs[0]
    assert hidden is not None
    assert hidden.shape is not None
    ids, mask = (input_named(graph, name) for name in ("input_ids", "attention_mask"))
    nodes: list[Node] = []

    def op(op_type: str, inputs: Sequence[Value], name: str, **attributes: int) -> Value:
        nodes.append(onnx_ir.node(op_type, inputs, attributes, name=name))
        made = nodes[-1].outputs[0]
        made.name, made.type = name, onnx_ir.TensorType(DataType.INT64)
        return made

    def constant(name: str, value: int | list[int]) -> Value:
        return added_constant(graph, name, np.array(value, np.int64))

    sequence, axis = op("Shape", [ids], f"{NAME}/sequence", start=1, end=2), constant(f"{NAME}/axis", [1])
    start = op("Neg", [sequence], f"{NAME}/start")
    # 1 where a token is, in the columns of this run
    run = op("Slice", [mask, start, constant(f"{NAME}/end", [TO_THE_END]), axis], f"{NAME}/run")
    bounds = [constant(f"{NAME}/zero", 0), op("Squeeze", [sequence], f"{NAME}/length"), constant(f"{NAME}/one", 1)]
    columns = op("Mul", [run, op("Range", bounds, f"{NAME}/columns")], f"{NAME}/tokens")
    last = op("ReduceMax", [columns, axis], f"{NAME}/last", keepdims=1)
    indices = op("Unsqueeze", [last, constant(f"{NAME}/new_axis", [2])], f"{NAME}/indices")
    kept = op("GatherND", [hidden, indices], NAME, batch_dims=1)
    kept.type = hidden.type
    graph.insert_before(node, nodes)
    node.replace_input_with(0, kept)
    kept.shape = hidden.shape
    _set_length(kept, hidden.shape[1], 1)


def keeps_last_position(graph: onnx_ir.Graph) -> bool:
    """Return whether a graph gives the logits of the last position alone."""
    return any(node.name == NAME for node in graph.all_nodes())


def restore_all_positions(graph: onnx_ir.Graph) -> None:
    """Undo `keep_last_position` in a lowered graph, in place, in each of its bodies."""
    bodies = bodies_of(graph)
    for body in (*bodies, graph):
        _restore_all_positions(body)
    for body in bodies:
        for given, output in zip(body.outputs, graph.outputs, strict=True):
            output.shape = given.shape or output.shape


def _restore_all_positions(graph: onnx_ir.Graph) -> None:
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


def _set_length(value: Value, old: int | onnx_ir.SymbolicDim, new: int | onnx_ir.SymbolicDim) -> None:
    """Change the second of three dimensions, of `value` and of all that is computed from it in that shape."""
    if value.shape is None or len(value.shape) != 3 or value.shape[1] != old:
        return
    value.shape = onnx_ir.Shape([value.shape[0], new, value.shape[2]])
    for node, _ in value.uses():
        for output in node.outputs:
            _set_length(output, old, new)
