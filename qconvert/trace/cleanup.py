"""Small passes that take out what tracing leaves behind. Each states its rule and changes nothing else."""

from __future__ import annotations

import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qconvert.ir.template import DOMAIN


def drop_reshape_pairs(graph: onnx_ir.Graph) -> None:
    """Reshape(Reshape(x)) whose result has the very shape of x is x.

    Attention ops of ONNX Runtime take [batch, sequence, heads * size], transformers goes through
    [batch, heads, sequence, size] on the way in and out.
    """
    for node in list(graph):
        if node.op_type != "Reshape" or node.inputs[0] is None:
            continue
        inner = node.inputs[0].producer()
        if inner is None or inner.op_type != "Reshape":
            continue
        original, result = inner.inputs[0], node.outputs[0]
        if original is None or original.shape is None or original.shape != result.shape or None in list(original.shape):
            continue
        replace(result, original)


def keep_sums_before_norms(graph: onnx_ir.Graph) -> None:
    """LayerNormalization(Add(a, b)) becomes LayerNormalization(Sum(a, b)).

    ONNX Runtime fuses the first into SkipLayerNormalization, whose CPU kernel takes five times as long as its two parts
    (16 x 128 rows of 384: 3.0 ms against 0.6 ms); it knows nothing to do with Sum.
    """
    for node in graph:
        if node.op_type != "LayerNormalization" or node.inputs[0] is None:
            continue
        add = node.inputs[0].producer()
        if add is not None and add.op_type == "Add":
            add.op_type = "Sum"


def drop_markers(graph: onnx_ir.Graph) -> None:
    """Block markers compute nothing: their output is their input."""
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type in ("BlockInput", "BlockOutput"):
            assert node.inputs[0] is not None
            replace(node.outputs[0], node.inputs[0])
            graph.remove(node, safe=True)


def replace(old: onnx_ir.Value, new: onnx_ir.Value) -> None:
    """Let every user of `old`, the graph's outputs included, take `new`, which inherits a public output name."""
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}/replaced"
        new.shape, new.type = old.shape, old.type
    onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def remove_unused(model: onnx_ir.Model) -> None:
    """Take out nodes and initializers that nothing needs."""
    RemoveUnusedNodesPass()(model)
