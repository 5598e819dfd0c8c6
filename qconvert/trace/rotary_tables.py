"""Tables of rotary embeddings, computed when a model is loaded instead of stored: 67 MB of a Llama 3 with 131,072 positions.

    cos [positions, pairs] = Cos(Range(positions) * frequencies) * scale        sin likewise

Everything is computed from constants, so ONNX Runtime folds it once, when it creates a session. Frequencies are not asked of
the model, whose classes call them this or that and scale them in many ways, but found in the tables, and proven on them.

Source: J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
from onnx_ir import DataType, Graph, Node, TensorType, Value
from onnx_ir.convenience import get_const_tensor, replace_all_uses_with

from qconvert.graph.values import added_constant

Array = np.ndarray[Any, Any]

# Inputs of GroupQueryAttention: cos_cache, sin_cache.
TABLES = (7, 8)
# A cosine in float32 has a rounding error of 6e-8; libraries are off by a few of these.
TOLERANCE = 1e-6


def compute_rotary_tables(graph: Graph) -> None:
    """Replace the tables that attentions rotate with by the nodes that compute them, wherever that gives the same, in place."""
    for cos, sin in dict.fromkeys(_tables(node) for node in graph if node.op_type == "GroupQueryAttention"):
        stored = [None if value is None else get_const_tensor(value) for value in (cos, sin)]
        if cos is None or sin is None or None in stored:
            continue
        tables = [tensor.numpy() for tensor in stored if tensor is not None]
        scale = tables[0][0, 0]
        frequencies = _frequencies(*tables)
        angles = np.arange(len(tables[0]), dtype=np.float32)[:, None] * frequencies
        found = np.cos(angles) * scale, np.sin(angles) * scale
        if all(np.allclose(table, made, rtol=0, atol=TOLERANCE * scale) for table, made in zip(tables, found, strict=True)):
            _compute(graph, cos, sin, frequencies, scale)


def _tables(attention: Node) -> tuple[Value | None, Value | None]:
    cos, sin = (attention.inputs[place] if place < len(attention.inputs) else None for place in TABLES)
    return cos, sin


def _frequencies(cos: Array, sin: Array) -> Array:
    """Return the angle between one position and the next [pairs], in float32.

    The angle at position 1 tells it roughly, those at 2, 4, 8 ... better and better: what is known by then is enough to say
    how many full turns the next one has.
    """
    frequencies = np.zeros(cos.shape[1])
    for power in range(max(len(cos) - 1, 0).bit_length()):
        position = 2**power
        angle = np.arctan2(sin[position].astype(np.float64), cos[position].astype(np.float64))
        turns = np.round((position * frequencies - angle) / (2 * np.pi))
        frequencies = (angle + 2 * np.pi * turns) / position
    return frequencies.astype(np.float32)


def _compute(graph: Graph, cos: Value, sin: Value, frequencies: Array, scale: Any) -> None:
    """Let nodes at the beginning of `graph` give what `cos` and `sin` hold."""
    assert cos.shape is not None
    nodes: list[Node] = []

    def constant(name: str, number: Any) -> Value:
        return added_constant(graph, name, np.asarray(number))

    def computed(name: str, op_type: str, inputs: list[Value], **attributes: Any) -> Value:
        nodes.append(onnx_ir.node(op_type, inputs, attributes, name=f"{name}/{op_type}"))
        nodes[-1].outputs[0].name = f"{name}/{op_type}/value"
        return nodes[-1].outputs[0]

    name = f"{cos.name}/angles"
    ends = [constant(f"{name}/{label}", number) for label, number in (("first", 0), ("end", cos.shape[0]), ("step", 1))]
    positions = computed(name, "Cast", [computed(name, "Range", ends)], to=DataType.FLOAT)
    column = computed(name, "Reshape", [positions, constant(f"{name}/column", [-1, 1])])
    angles = computed(name, "Mul", [column, constant(f"{name}/frequencies", frequencies[None])])
    for op_type, table in (("Cos", cos), ("Sin", sin)):
        name = str(table.name)
        made = computed(name, op_type, [angles])
        if scale != 1:
            made = computed(name, "Mul", [made, constant(f"{name}/scale", scale)])
        del graph.initializers[name]
        made.name, made.shape, made.type = name, table.shape, TensorType(DataType.FLOAT)
        replace_all_uses_with(table, made)
    graph.insert_before(graph[0], nodes)
