"""Small passes that take out what tracing leaves behind. Each states its rule and changes nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qconvert.graph.float_graph import replace
from qconvert.ir.template import DOMAIN
from qconvert.trace.rotary_tables import compute_rotary_tables


def drop_reshape_pairs(graph: onnx_ir.Graph) -> None:
    """Replace Reshape(Reshape(x)), whose result has the very shape of x, by x.

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
    """Replace LayerNormalization(Add(a, b)) by LayerNormalization(Sum(a, b)).

    ONNX Runtime fuses the first into SkipLayerNormalization, whose CPU kernel takes five times as long as its two parts
    (16 x 128 rows of 384: 3.0 ms against 0.6 ms); it knows nothing to do with Sum.
    """
    for node in graph:
        if node.op_type != "LayerNormalization" or node.inputs[0] is None:
            continue
        add = node.inputs[0].producer()
        if add is not None and add.op_type == "Add":
            add.op_type = "Sum"


def fuse_sums_into_rms_norms(graph: onnx_ir.Graph) -> None:
    """Replace RMSNormalization(Add(a, b)) over the last axis by SkipSimplifiedLayerNormalization(a, b), which adds too.

    One op less per norm and pass over the hidden state; a sum that broadcasts is left alone. Source:
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    """
    for norm in [node for node in graph if node.op_type == "RMSNormalization"]:
        total = norm.inputs[0]
        add = None if total is None else total.producer()
        if total is None or add is None or add.op_type != "Add" or not _is_hidden_state(total):
            continue
        axis, epsilon = norm.attributes.get("axis"), norm.attributes.get("epsilon")
        if any(value is None or value.shape != total.shape for value in add.inputs) or (axis and axis.as_int() not in (-1, 2)):
            continue
        fused = onnx_ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, norm.inputs[1]],
            {"epsilon": 1e-5 if epsilon is None else epsilon.as_float()},
            domain="com.microsoft",
            num_outputs=4,
            name=norm.name,
        )
        normalized, mean, deviation, skipped = fused.outputs
        mean.name = deviation.name = ""
        graph.insert_before(norm, fused)
        for old, new in ((norm.outputs[0], normalized), (total, skipped)):
            new.shape, new.type = old.shape, old.type
            new.name, old.name = old.name, f"{old.name}/fused"
            onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove([norm, add], safe=True)
    graph.sort()  # what else reads a sum may stand between it and its norm


def _is_hidden_state(value: onnx_ir.Value) -> bool:
    """[batch, sequence, hidden]: what SkipSimplifiedLayerNormalization takes, with its norm over the last axis."""
    return value.shape is not None and len(value.shape) == 3 and isinstance(value.shape[2], int)


def drop_zero_biases(graph: onnx_ir.Graph) -> None:
    """Take from MultiHeadAttention an attention bias that is zero everywhere: T5 makes one for every attention."""
    for node in graph:
        if node.op_type == "MultiHeadAttention" and len(node.inputs) > 5 and _is_zero(node.inputs[5]):
            node.replace_input_with(5, None)


def _is_zero(value: onnx_ir.Value | None) -> bool:
    """Return whether a value is a zero constant, spread out to some shape."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Expand" or node.inputs[0] is None:
        return False
    constant = onnx_ir.convenience.get_const_tensor(node.inputs[0])
    return constant is not None and not constant.numpy().any()


def pad_in_convolutions(graph: onnx_ir.Graph) -> None:
    """Let a convolution pad by itself where zeros are put around its input: the way in which TensorFlow's padding is ported."""
    for conv in [node for node in graph if node.domain == DOMAIN and node.op_type == "Conv"]:
        x = conv.inputs[0]
        pad = None if x is None else x.producer()
        if x is None or pad is None or len(x.uses()) > 1 or x.is_graph_output():
            continue
        zeros = _zeros_around(pad)
        if zeros is not None:
            pads = [own + added for own, added in zip(conv.attributes["pads"].as_ints(), zeros, strict=True)]
            conv.attributes["pads"] = onnx_ir.AttrInt64s("pads", pads)
            conv.replace_input_with(0, pad.inputs[0])


def _zeros_around(pad: onnx_ir.Node) -> list[int] | None:
    """How many zeros a Pad puts before height and width, and behind them; None for any other node."""
    mode = pad.attributes.get("mode")
    if pad.op_type != "Pad" or (mode is not None and mode.as_string() != "constant"):
        return None
    _, counts, filling, axes = (*pad.inputs, None, None)[:4]
    counted = _constant(counts)
    filled = [0] if filling is None else _constant(filling)
    if counted is None or filled is None or any(filled) or axes is not None:
        return None
    before, after = counted[:4], counted[4:]
    images = len(counted) == 8 and not any(before[:2] + after[:2])
    return before[2:] + after[2:] if images and min(counted) >= 0 else None


def _constant(value: onnx_ir.Value | None) -> list[Any] | None:
    """The numbers of a constant; None for what is none."""
    tensor = None if value is None else onnx_ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy().ravel().tolist()


def drop_markers(graph: onnx_ir.Graph) -> None:
    """Replace the output of every block marker by its input, since markers compute nothing."""
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type in ("BlockInput", "BlockOutput"):
            assert node.inputs[0] is not None
            replace(node.outputs[0], node.inputs[0])
            graph.remove(node, safe=True)


CleanUp = Callable[[onnx_ir.Graph], None]

# What is tried on every graph; one that then computes something else (trace/check.py) is taken without them.
CLEAN_UPS: tuple[CleanUp, ...] = (
    drop_reshape_pairs,
    drop_zero_biases,
    keep_sums_before_norms,
    fuse_sums_into_rms_norms,
    pad_in_convolutions,
    compute_rotary_tables,
)


def cleaned_up(model: onnx_ir.Model, clean_ups: Sequence[CleanUp]) -> onnx_ir.Model:
    """Return `model` itself, without block markers and unused nodes, and with `clean_ups` done."""
    drop_markers(model.graph)
    for clean_up in clean_ups:
        clean_up(model.graph)
    remove_unused(model)
    return model


def remove_unused(model: onnx_ir.Model) -> None:
    """Take out nodes and initializers that nothing needs."""
    RemoveUnusedNodesPass()(model)
