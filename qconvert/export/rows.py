"""Rows of activations as unsigned bytes, a step for each row: what integer products with int8 weights read.

Source: dynamic per-token quantization, as in Z. Yao et al., "ZeroQuant: Efficient and Affordable Post-Training Quantization for
Large-Scale Transformers", section 4.1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from onnx_ir import Value

from qconvert.export.graph import GraphBuilder
from qconvert.export.lowering import MICROSOFT
from qconvert.ir import activations


class Int8Weights(NamedTuple):
    """int8 weights [in, out], their scales [out] in float32, and their zero points [out], None where these are 0."""

    weight: Value
    scale: Value
    zero_point: Value | None = None


class QuantizedRows:
    """Makes rows of codes, once for all linears that read them.

    decodes: whether the graph is mostly run on one token at a time.
    """

    def __init__(self, builder: GraphBuilder, *, decodes: bool) -> None:
        self._builder, self._decodes = builder, decodes
        self._rows: dict[Value, tuple[Value, Value]] = {}
        self._zero_points: dict[tuple[object, int], Value] = {}

    def codes(self, x: Value, rows: activations.RowCodes, width: int, name: str) -> tuple[Value, Value]:
        """Return (uint8 codes of x [..., in], step of each row [..., 1]).

        width: in. name: of the layer that reads them first.
        """
        if x not in self._rows:
            builder = self._builder
            unit = builder.constant(f"qconvert/row_scale_{rows.zero_point}", np.array(1 / rows.steps, np.float32))
            step = builder.op("Mul", [self._largest(x, rows, name), unit], f"{name}/RowStep")
            if rows.least_step:
                least = builder.constant(f"qconvert/least_step_{rows.zero_point}", np.array(rows.least_step, np.float32))
                step = builder.op("Max", [step, least], f"{name}/LeastRowStep")
            # One block per row: faster than Div and QuantizeLinear with one scale, which pass over the input twice. A row of
            # zeros becomes 0 / 0 and some code or other; its product, a finite number, is then multiplied by 0.
            inputs = [x, step, self.zero_points(x, step, rows, name)]
            quantized = builder.op("QuantizeLinear", inputs, f"{name}/QuantizeRows", axis=-1, block_size=width)
            self._rows[x] = quantized, step
        return self._rows[x]

    def product(self, codes: Value, step: Value, rows: activations.RowCodes, weights: Int8Weights, name: str) -> Value:
        """Return the product of rows of codes and int8 weights, in float [..., out]. name: of the layer."""
        builder = self._builder
        one = builder.constant("qconvert/one", np.array(1, np.float32))
        inputs: list[Value | None] = [codes, weights.weight, one, weights.scale, self.zero_point(rows)]
        if weights.zero_point is not None:
            inputs.append(weights.zero_point)
        product = builder.op("MatMulIntegerToFloat", inputs, f"{name}/MatMulIntegerToFloat", MICROSOFT)
        return builder.op("Mul", [product, step], f"{name}/RestoreRows")

    def zero_point(self, rows: activations.RowCodes) -> Value:
        """Return the code of 0, a scalar."""
        return self._builder.constant(f"qconvert/row_zero_point_{rows.zero_point}", np.array(rows.zero_point, np.uint8))

    def zero_points(self, x: Value, step: Value, rows: activations.RowCodes, name: str) -> Value:
        """Return the code of 0 for each row [..., 1]; made once for all inputs that are known to have as many rows."""
        shape: object = x if x.shape is None or None in (dims := x.shape.dims[:-1]) else dims
        key = shape, rows.zero_point
        if key not in self._zero_points:
            # Any step by the largest float is 0, and its code the zero point: one node, where Shape and Expand are two.
            largest = self._builder.constant("qconvert/largest", np.array(np.finfo(np.float32).max))
            inputs = [step, largest, self.zero_point(rows)]
            self._zero_points[key] = self._builder.op("QuantizeLinear", inputs, f"{name}/RowZeroPoints")
        return self._zero_points[key]

    def _largest(self, x: Value, rows: activations.RowCodes, name: str) -> Value:
        """Return the largest value of each row, or its largest magnitude where rows have both signs: [..., 1].

        Two nodes are less to start for the one row of a decoding step; without Abs, which writes as much as it reads, many rows
        take two thirds of the time.
        """
        builder = self._builder
        axes = builder.constant("qconvert/last_axis", np.array([-1], np.int64))
        if not rows.symmetric:
            return builder.op("ReduceMax", [x, axes], f"{name}/RowMax", keepdims=1)
        if self._decodes:
            magnitude = builder.op("Abs", [x], f"{name}/Abs")
            return builder.op("ReduceMax", [magnitude, axes], f"{name}/RowMax", keepdims=1)
        largest = builder.op("ReduceMax", [x, axes], f"{name}/RowMax", keepdims=1)
        smallest = builder.op("ReduceMin", [x, axes], f"{name}/RowMin", keepdims=1)
        return builder.op("Max", [largest, builder.op("Neg", [smallest], f"{name}/Neg")], f"{name}/RowMagnitude")
