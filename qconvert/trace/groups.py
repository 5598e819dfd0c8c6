"""Which linears share an input, and who produces it: read off the graph, no architecture tables."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir

from qconvert.ir.layer import Producer
from qconvert.ir.template import DOMAIN, InputGroup, made_by

# Op -> the input that holds its weight; the normalised value is the first output.
NORMS = {
    "LayerNormalization": 1,
    "RMSNormalization": 1,
    "SimplifiedLayerNormalization": 1,
    "SkipSimplifiedLayerNormalization": 2,
}
ATTENTIONS = ("GroupQueryAttention", "MultiHeadAttention")


def input_groups(graph: onnx_ir.Graph, block_of: Callable[[str], str]) -> tuple[InputGroup, ...]:
    """All linears and convolutions of the graph, linears of one block that read one value together, in forward order.

    A convolution is alone: what it multiplies are patches of the value, cut by its own kernel and stride. Linears of
    several blocks may read one value (an encoder's output); they are quantized at different times, so nothing of the one
    group may change what the other reads.
    """
    members: dict[tuple[onnx_ir.Value, str], list[onnx_ir.Node]] = {}
    for node in graph:
        if node.domain == DOMAIN and node.op_type in ("Linear", "Conv"):
            assert node.inputs[0] is not None
            alone_or_block = _module(node) if node.op_type == "Conv" else block_of(_module(node))
            members.setdefault((node.inputs[0], alone_or_block), []).append(node)
    return tuple(
        InputGroup(tuple(_module(node) for node in nodes), _producer(value, nodes), made_by(value))
        for (value, _), nodes in members.items()
    )


def _module(node: onnx_ir.Node) -> str:
    return node.attributes["module"].as_string()


def _producer(value: onnx_ir.Value, readers: list[onnx_ir.Node]) -> Producer | None:
    """The norm or linear whose output channels are, one for one, the channels of `value`, if only `readers` see them.

    1. value = norm(x) * weight (+ bias): divide weight and bias.
    2. value = linear(x), or relu of it, or any x * linear(y): divide the linear's rows and bias.
    3. value = attention(q, k, v) with v a linear: its output mixes rows of v, never channels.
    """
    if value.is_graph_output() or {node for node, _ in value.uses()} != set(readers):
        return None
    if any(node.op_type == "Conv" for node in readers):
        return None
    node = value.producer()
    if node is None:
        return None
    if node.op_type in NORMS:
        weight = node.inputs[NORMS[node.op_type]] if value is node.outputs[0] else None
        if weight is not None and weight.is_initializer() and str(weight.name).endswith(".weight"):
            return Producer("norm", str(weight.name).removesuffix(".weight"))
        return None
    if node.op_type == "Relu":
        return _linear(node.inputs[0])
    if node.op_type == "Mul":
        return _linear(node.inputs[0]) or _linear(node.inputs[1])
    if node.op_type in ATTENTIONS:
        producer = _linear(node.inputs[2])
        return producer and Producer("linear", producer.name, _value_channels(node))
    return _linear(value, own=False)


def _linear(value: onnx_ir.Value | None, own: bool = True) -> Producer | None:
    """A linear that makes `value`; with `own`, only if the node at hand is its only reader."""
    node = None if value is None else value.producer()
    if node is None or node.domain != DOMAIN or node.op_type != "Linear":
        return None
    assert value is not None
    if own and len(value.uses()) != 1:
        return None
    return Producer("linear", _module(node))


def _value_channels(attention: onnx_ir.Node) -> tuple[int, ...] | None:
    """Output channel -> channel of v. Grouped-query attention gives several heads the same value head."""
    heads = attention.attributes["num_heads"].as_int()
    if attention.op_type != "GroupQueryAttention":
        return None
    kv_heads = attention.attributes["kv_num_heads"].as_int()
    value, output = attention.inputs[2], attention.outputs[0]
    assert value is not None
    assert output.shape is not None
    size = int(output.shape[2]) // heads  # type: ignore[arg-type]
    return tuple((head // (heads // kv_heads)) * size + channel for head in range(heads) for channel in range(size))
