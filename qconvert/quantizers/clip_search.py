"""Clip search: the part of the range of each group of weights to cover, so that what is left is resolved more finely."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import PerGroup, PerTensor, QuantScheme
from qconvert.plugin.quantizer import round_to_nearest


def least_squares_clip(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """Return the ratio, per group of `weight` [out, in], with the least squared error of rounding: [out, groups].

    1 where no other ratio is better. Some are above 1: symmetric int4 lacks the code 8, and the codes of a wider range may
    happen to lie nearer.
    """
    # Ratios a factor of 2^(1/4) apart, then, about the best of them, 2^(1/32) apart: 0.3 % from a search in steps of 0.01.
    # The few weights of a group have no long tail: half of their range is never the best (measured).
    smallest = 3 if isinstance(scheme.granularity, PerGroup) else 12
    coarse = [1.0, *(2 ** (-step / 4) for step in (-1, *range(1, smallest + 1)))]
    around = [1.0, *(2 ** (step / 32) for step in range(-4, 5) if step)]
    best = best_clip(weight, scheme, coarse)
    return best_clip(weight, scheme, [best * ratio for ratio in around])


def round_clipped(weight: Tensor, scheme: QuantScheme, energy: Tensor, min_clip: float) -> QuantizedTensor:
    """Round weight [out, in] to the nearest codes of ranges shrunk by 1 to `min_clip`: what loses least, weighted by energy
    [in].
    """
    ratios = torch.linspace(1.0, min_clip, 7).tolist()
    return round_to_nearest(weight, scheme, best_clip(weight, scheme, ratios, energy))


def best_clip(weight: Tensor, scheme: QuantScheme, ratios: Sequence[Tensor | float], energy: Tensor | None = None) -> Tensor:
    """Return the one of `ratios`, per group of `weight` [out, in], with the least sum of energy * (w - dequantize(q))^2.

    ratios: each above 0, one for all groups or one per group [out, groups].
    energy: [in], mean square of each input column; None weighs all columns alike.

    Returns [out, groups] (per tensor [1, 1]); of equals the one that comes first.
    """
    if isinstance(scheme.granularity, PerTensor):
        return _best_clip(weight, scheme, ratios, energy)
    best = torch.empty(scheme.scale_shape(*weight.shape))
    for rows in affine.row_blocks(*weight.shape):
        part = [ratio[rows] if isinstance(ratio, Tensor) else ratio for ratio in ratios]
        best[rows] = _best_clip(weight[rows], scheme, part, energy)
    return best


def _best_clip(weight: Tensor, scheme: QuantScheme, ratios: Sequence[Tensor | float], energy: Tensor | None) -> Tensor:
    best = torch.ones(scheme.scale_shape(*weight.shape))
    least: Tensor | None = None
    extremes = affine.extremes(weight, scheme)
    for ratio in ratios:
        error = affine.rounded(weight, scheme, affine.qparams_of(extremes, scheme, ratio)).sub_(weight).square_()
        if energy is not None:
            error *= energy
        error = affine.grouped(error, scheme).sum(-1)
        if least is None:
            least = torch.full_like(error, torch.inf)
        better = error < least
        best = torch.where(better, ratio, best)
        least = torch.where(better, error, least)
    return best
