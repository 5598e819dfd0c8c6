"""A second body for prompts, beside that for decoding, over the same packed weights.

For one token, MatMulNBits is fastest: it reads the fewest bytes. For many, it is slower than float, and integer products of
int8 rows by int8 weights are the fastest. The body for prompts computes with these; its weights are derived from the packed
codes when a session is created (derived_weights.py), so that nothing more is on disk.

    y = rows(x) @ w8^T * step of the row * step of the channel

The head reads what a final norm gives, in which a few channels are ten times larger than the others, and its error is that of
the logits. So what its rows of codes leave over is quantized once more, and multiplied too: 16 bits of an activation.
"""

from __future__ import annotations

from onnx_ir import Graph, Node, Value

from qconvert.export.derived_weights import can_derive, derived_weights
from qconvert.export.graph import GraphBuilder
from qconvert.export.rows import Int8Weights, QuantizedRows
from qconvert.graph.float_graph import substitute
from qconvert.graph.phases import branch_off, choose_by_length
from qconvert.ir import activations
from qconvert.ir.artifact import INPUT_KEY, LAYER_KEY, REST_KEY
from qconvert.ir.template import made_by


def add_prompt_phase(graph: Graph, builder: GraphBuilder, head: str | None) -> None:
    """Give a lowered decoder a body of its own for prompts, in place; one that has no packed weights is left as it is.

    head: the module whose activations get 16 bits.
    """
    if not any(_is_packed(node) for node in graph):
        return
    bodies = branch_off(graph)
    prompt = bodies["prompt"]
    products = [node for node in prompt if _is_packed(node)]
    weights = derived_weights(products, builder)
    graph.extend(builder.take_nodes())
    rows = QuantizedRows(builder, decodes=False)
    for node in products:
        output = _int8_product(node, weights[node], rows, builder, with_rest=node.metadata_props[LAYER_KEY] == head)
        substitute(prompt, node, builder.take_nodes(), output)
    choose_by_length(graph, bodies)


def _is_packed(node: Node) -> bool:
    """Whether a node multiplies packed weights, and is not left behind by one that does its work (pack.py)."""
    return (
        node.op_type == "MatMulNBits" and can_derive(node) and bool(node.outputs[0].uses() or node.outputs[0].is_graph_output())
    )


def _int8_product(node: Node, weights: Int8Weights, rows: QuantizedRows, builder: GraphBuilder, *, with_rest: bool) -> Value:
    """Add the nodes that compute what a MatMulNBits computes, by integer products, and return their output."""
    x, name = node.inputs[0], str(node.name)
    assert x is not None
    kind = activations.row_codes(made_by(x))
    width = node.attributes["K"].as_int()
    codes, step = rows.codes(x, kind, width, name)
    output = rows.product(codes, step, kind, weights, name)
    if with_rest:
        restored = [codes, step, rows.zero_points(x, step, kind, name)]
        known = builder.op("DequantizeLinear", restored, f"{name}/Known", axis=-1, block_size=width)
        rest = builder.op("Sub", [x, known], f"{name}/Rest")
        rest.shape, rest.type = x.shape, x.type
        rest_codes, rest_step = rows.codes(rest, activations.SYMMETRIC_ROWS, width, f"{name}/Rest")
        rest_product = rows.product(rest_codes, rest_step, activations.SYMMETRIC_ROWS, weights, f"{name}/Rest")
        output = builder.op("Add", [output, rest_product], f"{name}/AddRest")
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    if bias is not None:
        output = builder.op("Add", [output, bias], f"{name}/AddBias")
    last = output.producer()
    assert last is not None
    last.metadata_props[LAYER_KEY], last.metadata_props[INPUT_KEY] = (
        node.metadata_props[key] for key in (LAYER_KEY, INPUT_KEY)
    )
    if with_rest:
        last.metadata_props[REST_KEY] = "int8"
    return output
