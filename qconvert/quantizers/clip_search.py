"""Clip search: how far to shrink the range of each group of weights, so that what is left is resolved more finely."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.quantizer import round_to_nearest


def best_clip(weight: Tensor, scheme: QuantScheme, ratios: Sequence[float], energy: Tensor | None = None) -> Tensor:
    """Of `ratios`, per group of `weight` [out, in] the one with the least sum of energy * (w - dequantize(q))^2.

    energy: [in], mean square of each input column; None weighs all columns alike.

    Returns [out, groups] (per tensor [1, 1]); of equals the one that comes first.
    """
    best = torch.ones(scheme.scale_shape(*weight.shape))
    least: Tensor | None = None
    for ratio in ratios:
        error = (round_to_nearest(weight, scheme, ratio).dequantize() - weight).square_()
        if energy is not None:
            error *= energy
        error = affine.grouped(error, scheme).sum(-1)
        if least is None:
            least = torch.full_like(error, torch.inf)
        better = error < least
        best = torch.where(better, ratio, best)
        least = torch.where(better, error, least)
    return best
