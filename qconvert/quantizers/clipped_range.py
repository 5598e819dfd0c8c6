"""Rounding to the nearest code of a clipped range: the options that absmax, zero-point and per-channel share.

    mse         range = r * (what the weights span), r per scale with the least ||W - dequantize(quantize(W, r))||^2
    percentile  symmetric   |w| <= the p-th percentile of |w|
                asymmetric  w from the (100 - p)-th percentile of w to the p-th

A few large weights then cost the others less resolution, and are themselves set to the end of the range.

Source: H. Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation", section
3.3 (percentile); R. Banner et al., "Post training 4-bit quantization of convolutional networks for rapid-deployment",
section 3 (least squared error).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import PerTensor, QuantScheme
from qconvert.plugin.quantizer import round_to_nearest
from qconvert.quantizers.clip_search import least_squares_clip


@dataclass(frozen=True)
class ClippedRange:
    """How the range of each tensor, channel or group follows from its weights.

    clip: "none" covers every weight; "mse" takes the range with the least squared error; "percentile" covers all but the
        largest weights.
    percentile: the share of the weights, in percent, that "percentile" covers; asymmetric schemes leave out the rest at
        both ends. Of n weights it leaves out none while n * (100 - percentile) < 100.
    """

    clip: Literal["none", "mse", "percentile"] = "none"
    percentile: float = 99.9

    def __post_init__(self) -> None:
        if self.clip not in ("none", "mse", "percentile"):
            raise ValueError("clip must be 'none', 'mse' or 'percentile'")
        if not 50 < self.percentile <= 100:
            raise ValueError("percentile must be above 50 and at most 100")

    def rounded(self, weight: Tensor, scheme: QuantScheme) -> QuantizedTensor:
        """Round weight [out, in] to the nearest codes of the range that `clip` asks for."""
        match self.clip:
            case "none":
                return round_to_nearest(weight, scheme)
            case "mse":
                return round_to_nearest(weight, scheme, least_squares_clip(weight, scheme))
            case "percentile":
                return round_to_nearest(clamp_to_percentile(weight, scheme, self.percentile), scheme)


def clamp_to_percentile(weight: Tensor, scheme: QuantScheme, percentile: float) -> Tensor:
    """Clamp weight [out, in] to the percentile of its magnitudes in each tensor, channel or group of the scheme.

    A group where that would leave nothing but zeros stays as it is.
    """
    if isinstance(scheme.granularity, PerTensor):
        return _clamp(weight, scheme, percentile)
    clamped = torch.empty(weight.shape)
    for rows in affine.row_blocks(*weight.shape):
        clamped[rows] = _clamp(weight[rows], scheme, percentile)
    return clamped


def _clamp(weight: Tensor, scheme: QuantScheme, percentile: float) -> Tensor:
    groups = affine.grouped(weight, scheme)
    # Partitioned in place: torch.quantile refuses 16 million numbers, torch.kthvalue needs three times their memory.
    ordered = groups.abs() if scheme.symmetric else groups.clone()
    count = ordered.shape[-1]
    rank = math.ceil(count * percentile / 100) - 1
    ordered.numpy().partition([count - 1 - rank, rank], axis=-1)
    upper = ordered[..., rank, None].clamp(min=0.0)
    lower = -upper if scheme.symmetric else ordered[..., count - 1 - rank, None].clamp(max=0.0)
    nothing = lower == upper
    upper, lower = upper.masked_fill(nothing, torch.inf), lower.masked_fill(nothing, -torch.inf)
    return groups.clamp(lower, upper).reshape(weight.shape)
