"""A template's float graph in which static activations are rounded to their codes: what integer kernels compute, in float.

Integer kernels give the same codes, to one (verify/static_parity.py holds them to that). Biases stay float: their codes are
as fine as sums of products.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir
from onnx_ir import Graph

from qconvert.graph.float_graph import float_graph
from qconvert.graph.quantized_values import IsStatic, QuantizedValue, quantized_values
from qconvert.graph.values import added_constant
from qconvert.ir.activation_codes import ActivationCodes


def rounded_graph(
    template: onnx_ir.Model, shapes: Mapping[str, tuple[int, ...]], is_static: IsStatic, codes: Mapping[str, ActivationCodes]
) -> onnx_ir.Model:
    """Return the float graph (see `float_graph`) with every value rounded that static activations make codes of.

    is_static: whether a layer, by the name of its module, has static activations. codes: value -> its codes; others may be
    there, too.
    """
    model = template.clone()
    for found in quantized_values(model.graph, is_static):
        if found.root is found.value:  # what was only moved is rounded already
            _round(model.graph, found, codes[str(found.value.name)])
    return float_graph(model, shapes)


def _round(graph: Graph, found: QuantizedValue, codes: ActivationCodes) -> None:
    """Put a rounding behind a value, for those of its readers that read codes.

    Not as a pair of QuantizeLinear and DequantizeLinear, around which ONNX Runtime quantizes what is to stay float.
    """
    value, name = found.value, str(found.value.name)
    uses = [use for use in value.uses() if found.readers is None or use.node in found.readers]
    numbers = {"step": codes.scale, "lowest": -codes.zero_point, "highest": 2**codes.bits - 1 - codes.zero_point}
    step, lowest, highest = (added_constant(graph, f"{name}/{each}", np.float32(number)) for each, number in numbers.items())
    nodes = [onnx_ir.node("Div", [value, step], name=f"{name}/Steps")]
    nodes.append(onnx_ir.node("Round", nodes[-1].outputs, name=f"{name}/Round"))
    nodes.append(onnx_ir.node("Clip", [nodes[-1].outputs[0], lowest, highest], name=f"{name}/CutOff"))
    nodes.append(onnx_ir.node("Mul", [nodes[-1].outputs[0], step], name=f"{name}/Rounded"))
    for node in nodes:
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = node.name, value.shape, value.type
    rounded = nodes[-1].outputs[0]
    for use in uses:
        use.node.replace_input_with(use.idx, rounded)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)
    if found.readers is None and value.is_graph_output():
        rounded.name, value.name = name, f"{name}/float"
        graph.outputs[list(graph.outputs).index(value)] = rounded
