"""What ONNX Runtime's kernels want beside the shared bytes of model.safetensors; it goes into the sidecar.

weight-only linear   MatMulNBits: B = weight_packed itself where the width is a multiple of the block,
                     scales per block, zero points packed along the blocks
codebook linear      MatMulBnb4: weight and weight.absmax themselves; of scales with double quantization the plain ones
int8 activations     weight, weight_scale and weight_zero_point themselves; outlier columns beside them
conv2d               weight_packed, weight_scale itself; zero points unpacked
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.ir.affine import stored_scale
from qconvert.ir.layer_form import LayerForm
from qconvert.ir.model import TensorInfo
from qconvert.ir.plan import LayerPlan
from qconvert.ir.quantized import QuantizedTensor
from qconvert.targets.cpu import CPU


def stored_outliers(weight: Tensor) -> Tensor:
    """Float columns in half the space where the quantizer has rounded them to float16 already."""
    half = weight.half()
    return half if torch.equal(half.float(), weight) else weight


def sidecar_infos(plan: LayerPlan) -> dict[str, TensorInfo]:
    """Return what `sidecar_tensors` gives for a layer without outliers and smoothing scale, its scales in their own dtype."""
    out, groups = plan.out_features, plan.in_features // plan.scheme.group_size(plan.in_features)
    has_zero_points = not plan.scheme.symmetric
    if plan.form in (LayerForm.CONVOLUTION, LayerForm.PACKED_STATIC):
        return {"kernel_zero_point": TensorInfo(torch.uint8, (out, groups))} if has_zero_points else {}
    if not plan.form.is_packed:
        return {}
    infos: dict[str, TensorInfo] = {}
    size, bits = CPU.block_size(plan), plan.scheme.bits
    blocks = CPU.blocks(plan)
    if CPU.is_padded(plan):
        infos["kernel_weight"] = TensorInfo(torch.uint8, (out, blocks, size * bits // 8))
    if plan.scheme.scale_shape(out, plan.in_features) != (out, blocks):
        infos["kernel_scale"] = TensorInfo(plan.scheme.scale_dtype, (out, blocks))
    if has_zero_points:
        infos["kernel_zero_point"] = TensorInfo(torch.uint8, (out, -(-blocks * bits // 8)))
    return infos


def sidecar_tensors(plan: LayerPlan, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Suffix -> tensor that the graph for the CPU provider needs beside `plan.disk_tensors`.

    kernel_weight [out, blocks, block bytes] uint8: padded copy of the codes.
    kernel_scale [out, blocks]: the scale repeated per block, or as double quantization gives it.
    kernel_zero_point uint8: [out, ceil(blocks * bits / 8)] for linears, [out, groups] unsigned for conv2d and what
        is static.
    outlier_columns [n] int64, outlier_weight [n, out] float16 where that loses nothing, outlier_mask [in] uint8 with
    zeros at the outliers.
    input_factor [in] float32: what the input is multiplied by, 1 / smoothing_scale.
    """
    extra: dict[str, Tensor] = {}
    if tensor.smoothing_scale is not None:
        extra["input_factor"] = 1 / tensor.smoothing_scale
    match plan.form:
        case LayerForm.CONVOLUTION | LayerForm.PACKED_STATIC:
            extra |= _unpacked_zero_points(plan, tensor)
        case LayerForm.INT8_ROWS | LayerForm.INT8_STATIC | LayerForm.INT8_EMBEDDING:
            extra |= _outliers(plan, tensor)
        case LayerForm.CODEBOOK_WEIGHTS if tensor.nested_scale is not None:
            extra["kernel_scale"] = tensor.scale
        case LayerForm.PACKED_WEIGHTS | LayerForm.PACKED_EMBEDDING:
            extra |= _blocks(plan, tensor)
    return extra


def _unpacked_zero_points(plan: LayerPlan, tensor: QuantizedTensor) -> dict[str, Tensor]:
    if tensor.zero_point is None:
        return {}
    unsigned = tensor.zero_point.to(torch.int16) + plan.scheme.format.offset
    return {"kernel_zero_point": unsigned.to(torch.uint8).expand(plan.out_features, -1)}


def _outliers(plan: LayerPlan, tensor: QuantizedTensor) -> dict[str, Tensor]:
    if tensor.outliers is None:
        return {}
    mask = torch.ones(plan.in_features, dtype=torch.uint8)
    mask[tensor.outliers.columns] = 0
    weight = stored_outliers(tensor.outliers.weight.T)
    return {"outlier_columns": tensor.outliers.columns, "outlier_weight": weight, "outlier_mask": mask}


def _blocks(plan: LayerPlan, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Codes, scales and zero points in the kernel's blocks, where the shared file does not hold them so."""
    extra: dict[str, Tensor] = {}
    size, out, pack = CPU.block_size(plan), plan.out_features, plan.scheme.format.pack
    blocks = CPU.blocks(plan)
    if CPU.is_padded(plan):
        padded = torch.nn.functional.pad(tensor.q, (0, blocks * size - plan.in_features))
        extra["kernel_weight"] = pack(padded).reshape(out, blocks, -1)
    per_block = blocks // tensor.scale.shape[1]
    if tensor.scale.shape != (out, blocks):
        extra["kernel_scale"] = stored_scale(tensor.scale, plan.scheme).repeat_interleave(per_block, 1).expand(out, -1)
    if tensor.zero_point is not None:
        extra["kernel_zero_point"] = pack(tensor.zero_point.repeat_interleave(per_block, 1).expand(out, -1))
    return extra
