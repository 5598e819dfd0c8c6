"""Static activations: pairs of QuantizeLinear and DequantizeLinear, and layers over dequantized codes.

This is the QDQ form (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html), which any runtime can run
as it stands, in float, and which those with integer kernels fuse: Conv to QLinearConv, Gemm to QGemm, MatMul to
MatMulIntegerToFloat. Weights are signed, activations unsigned; see export/processors.py for those that multiply these wrongly.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir
import torch
from onnx_ir import Graph, Node, Value

from qconvert.export.context import ExportContext
from qconvert.export.graph import GraphBuilder
from qconvert.graph.float_graph import substitute
from qconvert.graph.layer_inputs import layer_inputs
from qconvert.graph.quantized_values import QuantizedValue, quantized_values
from qconvert.graph.static_codes import BIAS_CODES, CUT_OFF
from qconvert.ir.activation_codes import ActivationCodes
from qconvert.ir.plan import LayerPlan
from qconvert.storage.reader import read_tensor

# Bits of a code -> the type of its zero point. Those of 4 bits have a byte each, since integer kernels know no others.
ZERO_POINTS = {4: np.uint8, 8: np.uint8, 16: np.uint16}
LARGEST_INT32 = np.iinfo(np.int32).max


def insert_pairs(graph: Graph, builder: GraphBuilder, context: ExportContext) -> None:
    """Put a pair behind every value of a template's graph that is quantized, in place."""
    job = context.job
    values = quantized_values if job.model.trained is None else layer_inputs
    for found in values(graph, job.plan.is_static_layer):
        assert found.root.name is not None
        _insert_pair(graph, builder, found, context.codes[found.root.name])


def _insert_pair(graph: Graph, builder: GraphBuilder, found: QuantizedValue, codes: ActivationCodes) -> None:
    value, name = found.value, found.value.name
    readers = [use for use in value.uses() if found.readers is None or use.node in found.readers]
    scale = builder.constant(f"{found.root.name}/scale", np.array(codes.scale, np.float32))
    zero_point = builder.constant(f"{found.root.name}/zero_point", np.array(codes.zero_point, ZERO_POINTS[codes.bits]))
    is_cut = codes.bits == 4 and found.root is value  # what was only moved has been cut off already
    source = _cut_off(builder, value, codes) if is_cut else value
    quantized = builder.op("QuantizeLinear", [source, scale, zero_point], f"{name}/QuantizeLinear")
    quantized.name, quantized.shape, quantized.type = f"{name}/codes", value.shape, zero_point.type
    output = builder.op("DequantizeLinear", [quantized, scale, zero_point], f"{name}/DequantizeLinear")
    output.name, output.shape, output.type = f"{name}/from_codes", value.shape, value.type
    for use in readers:
        use.node.replace_input_with(use.idx, output)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], builder.take_nodes())
    else:
        graph.insert_after(producer, builder.take_nodes())
    if found.readers is None and value.is_graph_output():
        output.name, value.name = name, f"{name}/float"
        graph.outputs[list(graph.outputs).index(value)] = output


def _cut_off(builder: GraphBuilder, value: Value, codes: ActivationCodes) -> Value:
    """The value, cut off where codes end that are shorter than their type."""
    low = builder.constant(f"{value.name}/lowest", np.array(codes.low, np.float32))
    high = builder.constant(f"{value.name}/highest", np.array(codes.high, np.float32))
    output = builder.op("Clip", [value, low, high], f"{value.name}{CUT_OFF}")
    output.shape, output.type = value.shape, value.type
    return output


def keep_float_products(graph: Graph) -> None:
    """Let convolutions and linear layers with float weights stay what they are where codes go in and come out, in place.

    ONNX Runtime 1.31 quantizes their weights by itself when a session is created, with one scale for all (measured: off by
    30 % of the largest): those of Conv, and of Gemm, which it makes of MatMul and Add. It does not look through a Sum.
    """
    products = [node for node in graph if node.op_type in ("Conv", "MatMul")]
    for node in products:
        if [_is_from_codes(value) for value in node.inputs[:2]] != [True, False]:
            continue
        if node.op_type == "Conv":
            alone = Node(node.domain, node.op_type, node.inputs, list(node.attributes.values()), name=node.name)
            total = onnx_ir.node("Sum", alone.outputs, name=f"{node.name}/InFloat")
            substitute(graph, node, [alone, total], total.outputs[0])
        for add in [use.node for use in node.outputs[0].uses() if use.node.op_type == "Add"]:
            total = onnx_ir.node("Sum", list(add.inputs), name=add.name)
            substitute(graph, add, [total], total.outputs[0])


def _is_from_codes(value: Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


class StaticLowering:
    """Lowers layers whose input is quantized in a range that calibration has found.

    weights: the nodes that dequantize weights for products of 8-bit codes.
    """

    def __init__(self, builder: GraphBuilder, context: ExportContext) -> None:
        self.builder, self.context = builder, context
        self.weights: list[Node] = []

    def lower(self, plan: LayerPlan, node: Node, x: Value, bias: Value | None) -> Value:
        """Return the value that the nodes for an opaque `node` give. x: from codes; bias: in float32."""
        if node.op_type == "Conv":
            kernel = node.attributes["kernel_shape"].as_ints()
            shape = (plan.out_features, plan.in_features // math.prod(kernel), *kernel)
            attributes = [value for key, value in node.attributes.items() if key != "module"]
            return self._product("Conv", plan, [x, self._weight(plan, shape), bias], attributes)
        if x.shape is not None and len(x.shape) == 2:
            return self._product("Gemm", plan, [x, self._weight(plan), bias], [onnx_ir.AttrInt64("transB", 1)])
        product = self.builder.op("MatMul", [x, self._weight(plan, transposed=True)], f"{plan.name}/MatMul")
        return product if bias is None else self.builder.op("Add", [product, bias], f"{plan.name}/AddBias")

    def _product(self, op_type: str, plan: LayerPlan, inputs: list[Value | None], attributes: list[onnx_ir.Attr]) -> Value:
        """A Conv or Gemm of (x, weight, bias or None). The bias is written in int32 where these hold it."""
        x, weight, bias = inputs
        assert x is not None
        codes = self._bias_codes(plan, x) if bias is not None else None
        node = Node(
            "", op_type, [x, weight] if codes is None else [x, weight, codes], attributes, name=f"{plan.name}/{op_type}"
        )
        self.builder.nodes.append(node)
        if bias is None or codes is not None:
            return node.outputs[0]
        if op_type == "Conv":
            shape = self.builder.constant(f"{plan.name}/bias_shape", np.array([plan.out_features, 1, 1], np.int64))
            bias = self.builder.op("Reshape", [bias, shape], f"{plan.name}/Bias")
        return self.builder.op("Add", [node.outputs[0], bias], f"{plan.name}/AddBias")

    def _weight(self, plan: LayerPlan, shape: tuple[int, ...] | None = None, *, transposed: bool = False) -> Value:
        """The dequantized weight: [out, in], in `shape`, or transposed, [in, out]."""
        builder, name = self.builder, plan.name
        weight = builder.external(f"{name}.weight", shape)
        if transposed:
            weight = builder.op("Transpose", [weight], f"{name}/Transpose", perm=[1, 0])
        scale = builder.float32(builder.external(f"{name}.weight_scale", (plan.out_features,)))
        axis = 1 if transposed else 0
        inputs = [weight, scale, builder.repeated(np.int8(0), plan.out_features)]  # without, ONNX Runtime makes no QGemm
        output = builder.op("DequantizeLinear", inputs, f"{name}/DequantizeWeight", axis=axis)
        if plan.scheme.activations is not None and plan.scheme.activations.bits == 8:
            self.weights.append(builder.nodes[-1])
        return output

    def _bias_codes(self, plan: LayerPlan, x: Value) -> Value | None:
        """The bias, from int32 codes whose scales are those of the sums that it is added to; None where int32 is too short.

        That is so where the weights of a channel are next to nothing beside its bias.
        """
        builder, name = self.builder, plan.name
        producer = x.producer()
        assert producer is not None
        step = producer.inputs[1]
        assert step is not None
        assert step.const_value is not None
        key = f"{name}{BIAS_CODES}{step.name}"  # a layer may be called twice, on values of different range
        if key not in builder.stored:
            folder, stored = self.context.stage.folder, self.context.stored
            bias = read_tensor(folder, stored[f"{name}.bias"]).double()
            scale = read_tensor(folder, stored[f"{name}.weight_scale"]).flatten().float() * float(step.const_value.numpy())
            codes = torch.round(bias / scale.double())
            if not codes.abs().max() <= LARGEST_INT32:
                return None
            stored[key] = self.context.stage.sidecar.append(key, codes.to(torch.int32))
            stored[f"{key}/scale"] = self.context.stage.sidecar.append(f"{key}/scale", scale)
        inputs = [builder.external(key), builder.external(f"{key}/scale")]
        return builder.op("DequantizeLinear", inputs, f"{name}/DequantizeBias", axis=0)
