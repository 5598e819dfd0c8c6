"""The part of lowering that every provider shares: the order of things, smoothing, outliers, convolutions, gathered codes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import onnx_ir
from onnx_ir import DataType, Value

from qconvert.export.context import ExportContext
from qconvert.export.dequantized import dequantized
from qconvert.export.graph import GraphBuilder
from qconvert.ir.plan import LayerPlan

MICROSOFT = "com.microsoft"


class Lowering(ABC):
    """Lowers one layer after the other; what layers with a common input share is made once.

    builder: of the graph at hand.
    """

    def __init__(self, builder: GraphBuilder, context: ExportContext) -> None:
        self.builder, self.context = builder, context
        self.outlier_columns, self.group_of = context.outlier_columns, context.group_of
        self._inputs: dict[tuple[Value, object], Value] = {}

    @abstractmethod
    def lower(self, plan: LayerPlan, node: onnx_ir.Node, bias: Value | None) -> Value:
        """Add the nodes for `node` to the builder and give their output."""

    @abstractmethod
    def stored_float(self, name: str) -> Value:
        """Return the stored tensor `name` in the float type of the graph's activations."""

    def _scaled_input(self, plan: LayerPlan, x: Value) -> Value:
        """Return x / smoothing_scale where a scale could not be folded; the linears of an InputGroup were given one scale."""
        name = f"{plan.name}.input_factor"
        if name not in self.builder.stored:
            return x
        key = x, ("input_factor", self.group_of[plan.name])
        if key not in self._inputs:
            self._inputs[key] = self.builder.op("Mul", [x, self.stored_float(name)], f"{plan.name}/ScaleInput")
        return self._inputs[key]

    def _without(self, x: Value, columns: tuple[int, ...], plan: LayerPlan) -> Value:
        """Return x with the outlier columns set to 0, so that they neither stretch rows nor count in the product of codes."""
        if not columns:
            return x
        if (x, columns) not in self._inputs:
            mask = self.stored_float(f"{plan.name}.outlier_mask")
            self._inputs[x, columns] = self.builder.op("Mul", [x, mask], f"{plan.name}/MaskOutliers")
        return self._inputs[x, columns]

    def _outlier_product(self, x: Value, columns: tuple[int, ...], plan: LayerPlan) -> Value:
        builder, name = self.builder, plan.name
        if (x, ("gathered", columns)) not in self._inputs:
            indices = builder.external(f"{name}.outlier_columns")
            gathered = builder.op("Gather", [x, indices], f"{name}/GatherOutliers", axis=-1)
            self._inputs[x, ("gathered", columns)] = gathered
        weight = self.stored_float(f"{name}.outlier_weight")
        return builder.op("MatMul", [self._inputs[x, ("gathered", columns)], weight], f"{name}/OutlierMatMul")

    def _gather_block_quantized(
        self, plan: LayerPlan, indices: Value, block_size: int, scale: Value, zero_point: Value | None = None
    ) -> Value:
        """Rows of an embedding's packed codes, dequantized. scale, zero_point: per block, as MatMulNBits takes them."""
        builder, name, bits = self.builder, plan.name, plan.scheme.bits
        shape = (plan.out_features, plan.in_features * bits // 8)
        # Another initializer than the head's, which has a block axis; both map the same bytes.
        rows = builder.external(f"{name}.weight_packed", shape, DataType.UINT8, view="/rows")
        return builder.op(
            "GatherBlockQuantized",
            [rows, indices, scale] if zero_point is None else [rows, indices, scale, zero_point],
            f"{name}/GatherBlockQuantized",
            MICROSOFT,
            bits=bits,
            block_size=block_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def _conv2d(self, plan: LayerPlan, node: onnx_ir.Node, x: Value, bias: Value | None) -> Value:
        kernel = node.attributes["kernel_shape"].as_ints()
        weight = dequantized(self.builder, plan, (plan.out_features, -1, *kernel))
        attributes = [value for key, value in node.attributes.items() if key != "module"]
        inputs = [x, weight] if bias is None else [x, weight, bias]
        conv = onnx_ir.Node("", "Conv", inputs, attributes, name=f"{plan.name}/Conv")
        self.builder.nodes.append(conv)
        return conv.outputs[0]
