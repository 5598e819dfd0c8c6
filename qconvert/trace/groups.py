"""The linears that share an input, and its producer: read off the graph, no architecture tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import onnx_ir

from qconvert.graph.quantized_values import is_opaque_product
from qconvert.ir.layer import Producer
from qconvert.ir.template import DOMAIN, InputGroup, made_by, module_of

# Op -> the input that holds its weight; the normalised value is the first output.
NORMS = {
    "LayerNormalization": 1,
    "RMSNormalization": 1,
    "SimplifiedLayerNormalization": 1,
    "SkipSimplifiedLayerNormalization": 2,
}
ATTENTIONS = ("GroupQueryAttention", "MultiHeadAttention")


def input_groups(graphs: Sequence[onnx_ir.Graph], block_of: Callable[[str], str]) -> tuple[InputGroup, ...]:
    """Return all linears and convolutions of a model's graphs in forward order, linears of one block with one input together.

    A convolution is alone: what it multiplies are patches of the value, cut by its own kernel and stride. Linears of
    several blocks may read one value (an encoder's output); they are quantized at different times, so nothing of the one
    group may change what the other reads. Of linears that run more than once, those are together that share every input.
    """
    calls: dict[str, list[onnx_ir.Node]] = {}
    for node in (node for graph in graphs for node in graph):
        if is_opaque_product(node):
            calls.setdefault(module_of(node), []).append(node)
    members: dict[tuple[tuple[onnx_ir.Value, ...], str], list[str]] = {}
    for name, nodes in calls.items():
        alone_or_block = name if nodes[0].op_type == "Conv" else block_of(name)
        members.setdefault((_read_by(nodes), alone_or_block), []).append(name)
    groups = []
    for (values, _), names in members.items():
        readers = {node for name in names for node in calls[name]}
        producers = {_producer(value, readers) for value in values}
        producer = producers.pop() if len(producers) == 1 else None
        if producer and _times_used(producer, calls, graphs) > len(values):
            producer = None
        makers = {made_by(value) for value in values}
        groups.append(InputGroup(tuple(names), producer, makers.pop() if len(makers) == 1 else None))
    return tuple(groups)


def _read_by(nodes: Sequence[onnx_ir.Node]) -> tuple[onnx_ir.Value, ...]:
    """Return the values that the calls of one layer read, each once."""
    return tuple(dict.fromkeys(value for node in nodes if (value := node.inputs[0]) is not None))


def _times_used(producer: Producer, calls: Mapping[str, Sequence[onnx_ir.Node]], graphs: Sequence[onnx_ir.Graph]) -> int:
    """Return how often the model computes with a producer; a norm is found by its weight."""
    if producer.kind == "linear":
        return len(calls[producer.name])
    weight = f"{producer.name}.weight"
    return sum(len(graph.initializers[weight].uses()) for graph in graphs if weight in graph.initializers)


def _producer(value: onnx_ir.Value, readers: Collection[onnx_ir.Node]) -> Producer | None:
    """The norm or linear whose output channels are, one for one, the channels of `value`, if only `readers` see them.

    1. value = norm(x) * weight (+ bias): divide weight and bias.
    2. value = linear(x), or relu of it, or any x * linear(y): divide the linear's rows and bias.
    3. value = attention(q, k, v) with v a linear: its output mixes rows of v, never channels.
    4. value = x with its rows in another order: as x.
    """
    if value.is_graph_output() or any(node not in readers for node, _ in value.uses()):
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
    if node.op_type == "GatherND" and node.inputs[0] is not None:
        return _producer(node.inputs[0], [node])
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
    return Producer("linear", module_of(node))


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
