"""The int8 weights that the body for prompts computes with, as ONNX Runtime derives them from the codes of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.ir.quantized import QuantizedTensor

# Of packed codes that such weights can be derived from.
PROMPT_BITS = (4, 8)
# Steps from 0 to the largest weight of a row: all that a signed byte has, and half of them where products of unsigned by signed
# bytes are added up in 16 bits (export/derived_weights.py).
LEVELS, LEVELS_WITHOUT_VNNI = 127, 63
# No step is smaller: of a row without weights it would be 0.
LEAST_STEP = 1e-30


def prompt_weights(tensor: QuantizedTensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return (int8 weights [out, in], step of each row [out, 1]) of a layer with packed codes, in the arithmetic of float32.

    tensor: with signed codes, scales and zero points per group. levels: LEVELS, or those for a processor that saturates.
    """
    out, width = tensor.q.shape
    offset = 2 ** (tensor.scheme.bits - 1)
    scale = tensor.scale.float().expand(out, -1)
    groups = scale.shape[1]
    points = torch.zeros_like(scale) if tensor.zero_point is None else tensor.zero_point.float().expand(out, groups)
    # From the zero point to the lowest and to the highest code.
    farthest = torch.maximum(points + offset, offset - 1 - points)
    step = ((scale.abs() * farthest).amax(1, keepdim=True) / levels).clamp(min=LEAST_STEP)
    ratio = (scale / step).repeat_interleave(width // groups, 1)
    centred = tensor.q.float() - points.repeat_interleave(width // groups, 1)
    return torch.round(centred * ratio).clamp(-128, 127).to(torch.int8), step
