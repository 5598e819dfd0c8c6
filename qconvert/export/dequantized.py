"""Packed codes as a float weight, by operators that fold when a session is created: small on disk, float at run time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx_ir import DataType, Value

from qconvert.export.graph import GraphBuilder
from qconvert.ir.plan import LayerPlan

# Bits of a code -> the type that ONNX reads packed codes as.
CODE_TYPES = {4: DataType.UINT4, 8: DataType.UINT8}


def dequantized(builder: GraphBuilder, plan: LayerPlan, shape: Sequence[int]) -> Value:
    """Return the float weight of a layer with packed codes in `shape`, such as [out, in / groups, kh, kw] of a kernel."""
    name, bits, out = plan.name, plan.scheme.bits, plan.out_features
    per_word = 32 // bits
    words = -(-plan.in_features // per_word)
    codes = builder.op(
        "Cast",
        [builder.external(f"{name}.weight_packed", (out, words * per_word), CODE_TYPES[bits])],
        f"{name}/Codes",
        to=DataType.FLOAT,
    )
    if words * per_word != plan.in_features:
        ends = builder.constant(f"{name}/width", np.array([plan.in_features], np.int64))
        start = builder.constant("qconvert/zero", np.array([0], np.int64))
        axis = builder.constant("qconvert/axis_1", np.array([1], np.int64))
        codes = builder.op("Slice", [codes, start, ends, axis], f"{name}/Unpad")
    groups = plan.in_features // plan.scheme.group_size(plan.in_features)
    grouped = builder.constant(f"{name}/grouped", np.array([out, groups, -1], np.int64))
    codes = builder.op("Reshape", [codes, grouped], f"{name}/Group")
    if plan.scheme.symmetric:
        zero_point = builder.constant(f"qconvert/zero_point_int{bits}", np.array(plan.scheme.format.offset, np.float32))
    else:
        zero_point = builder.float32(builder.external(f"{name}.kernel_zero_point", (out, groups, 1)))
    centred = builder.op("Sub", [codes, zero_point], f"{name}/Centre")
    scale = builder.float32(builder.external(f"{name}.weight_scale", (out, groups, 1)))
    weight = builder.op("Mul", [centred, scale], f"{name}/Dequantize")
    full = builder.constant(f"{name}/kernel_shape", np.array(shape, np.int64))
    return builder.op("Reshape", [weight, full], f"{name}/Kernel")
