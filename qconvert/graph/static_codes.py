"""Codes of static activations in a graph that was lowered, and how they are taken out of it."""

from __future__ import annotations

from collections.abc import Callable

from onnx_ir import DataType, Graph, Value

from qconvert.graph.float_graph import replace

# Stands between the names of a layer and of its input's scale, in the name of the initializer that holds the bias as int32.
BIAS_CODES = ".bias_codes/"
# Ends the name of the node that cuts a value off where its codes end, if these are shorter than their type.
CUT_OFF = "/CutOff"


def static_codes(graph: Graph) -> list[Value]:
    """Return the codes of static activations: what QuantizeLinear makes for DequantizeLinear."""
    quantized = [node.outputs[0] for node in graph if node.op_type == "QuantizeLinear"]
    return [value for value in quantized if any(use.node.op_type == "DequantizeLinear" for use in value.uses())]


def drop_static_codes(graph: Graph, float_bias: Callable[[str], Value]) -> None:
    """Let static activations be what they are before they are quantized, and biases what `float_bias` gives for a layer's name.

    What goes through codes on its way to an output of the graph goes there as it is.
    """
    for value in static_codes(graph):
        node = value.producer()
        assert node is not None
        before = node.inputs[0]
        assert before is not None
        cut = before.producer()
        if cut is not None and str(cut.name).endswith(CUT_OFF):
            before = cut.inputs[0]
            assert before is not None
        for use in [use for use in value.uses() if use.node.op_type == "DequantizeLinear"]:
            replace(use.node.outputs[0], before)
    for codes in [value for value in graph.initializers.values() if value.dtype == DataType.INT32]:
        layer, found, _ = str(codes.name).partition(BIAS_CODES)
        if found:
            ((node, _),) = codes.uses()
            replace(node.outputs[0], float_bias(layer))
