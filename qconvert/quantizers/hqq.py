"""HQQ: the scale of each group fitted to its weights by half-quadratic splitting, which lets a few of them go far off.

    minimise     sum |W - s (q - z)|^p                p < 1: many small errors and a few large ones, like the weights' tails
    alternate    W_e = shrink(W - s (q - z))          the part of the error that is given up
                 s   = <q - z, W - W_e> / |q - z|^2   least squares on what is left
    with         shrink(e) = sign(e) max(|e| - |e|^(p-1) / beta, 0), and beta growing

The paper keeps s and moves z, in float. Zero points here are integers, and its step never moves those (measured): what errors
of rounding average to is less than half a step. So s moves instead, and the search begins twice: with the range that covers
the weights, and with the one of the least squared error, which has a zero point of its own.

Source: H. Badri and A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.layer import Layer
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import PerTensor, QuantScheme
from qconvert.plugin import hookimpl
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.quantizers.clip_search import least_squares_clip


@hookimpl
def register_quantizers() -> list[type[Quantizer]]:
    """Register hqq."""
    return [HQQQuantizer]


@dataclass(frozen=True)
class HQQQuantizer(Quantizer):
    """Half-quadratic quantization, weights only. Needs no data.

    iterations: how often the scale is fitted again, from each of the two; 0 rounds to nearest.
    norm: the p of the error that is minimised.
    beta: weight of the quadratic term at first, for errors in steps of the scale: above it, less error is given up.
    growth: factor of beta from one iteration to the next.
    """

    iterations: int = 5
    norm: float = 0.7
    beta: float = 1.0
    growth: float = 1.6

    name = "hqq"
    default_scheme = QuantScheme.parse("int4-g32-asym")

    def __post_init__(self) -> None:
        if self.iterations < 0 or not 0 < self.norm <= 1:
            raise ValueError("iterations must be at least 0, norm above 0 and at most 1")
        if not self.beta > 0 or not self.growth >= 1:
            raise ValueError("beta must be above 0, growth at least 1")

    def refuses(self, scheme: QuantScheme) -> str | None:
        """Refuse int8 activations, and one scale per tensor."""
        if scheme.activations and not scheme.is_static:
            return "HQQ quantizes weights only; leave out -a8"
        if isinstance(scheme.granularity, PerTensor):
            return "HQQ fits a scale per channel or group; take -channel or -gN"
        return None

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        """Round to the nearest codes of fitted scales and zero points, a block of rows at a time."""
        if self.iterations == 0:
            return round_to_nearest(layer.weight, scheme)
        fitted = [self._fit(layer.weight[rows], scheme) for rows in affine.row_blocks(*layer.weight.shape)]
        # Once more for all rows: one may have left what float16 holds on its way.
        scale = affine.round_scale(torch.cat([scale for scale, _ in fitted]), scheme)
        zero_point = None if scheme.symmetric else torch.cat([zero for _, zero in fitted if zero is not None])
        return QuantizedTensor(affine.quantize(layer.weight, scale, zero_point, scheme), scale, zero_point, scheme)

    def _fit(self, weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point [out, groups] of the iterate with the least loss, for each group of weight [out, in].

        The first iterate is rounding to nearest, so none is worse.
        """
        best_scale, best_zero = affine.choose_qparams(weight, scheme)
        step, least = best_scale, torch.full_like(best_scale, torch.inf)
        for ratio in (1.0, least_squares_clip(weight, scheme)):
            for scale, zero, loss in self._iterates(weight, scheme, ratio, step):
                better = loss < least
                least = torch.where(better, loss, least)
                best_scale = torch.where(better, scale, best_scale)
                if zero is not None and best_zero is not None:
                    best_zero = torch.where(better, zero, best_zero)
        return best_scale, best_zero

    def _iterates(
        self, weight: Tensor, scheme: QuantScheme, ratio: Tensor | float, step: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Scale, zero point and loss sum |error|^p, each [out, groups], from the range of weight [out, in] times `ratio`.

        step: [out, groups], what errors are measured in, so that beta means the same for any weights.
        """
        scale, zero = affine.choose_qparams(weight, scheme, ratio)
        weight_steps = affine.grouped(weight, scheme) / step.unsqueeze(-1)
        beta = self.beta
        for _ in range(self.iterations + 1):
            q = affine.quantize(weight, scale, zero, scheme)
            levels = affine.grouped(affine.dequantize(q, torch.ones_like(scale), zero, scheme), scheme)  # q - z
            error = weight_steps - levels * (scale / step).unsqueeze(-1)
            magnitude = error.abs()
            powered = magnitude.pow(self.norm)
            yield scale, zero, powered.sum(-1)
            given_up = error.sign() * (magnitude - powered / (beta * magnitude).clamp(min=1e-12)).clamp(min=0)
            scale = affine.round_scale(step * _least_squares(levels, weight_steps - given_up, scale / step), scheme)
            beta *= self.growth


def _least_squares(levels: Tensor, target: Tensor, otherwise: Tensor) -> Tensor:
    """The s with the least |target - s levels|^2 in each group [out, groups, n]; `otherwise` where all levels are 0."""
    square = levels.square().sum(-1)
    return torch.where(square > 0, (levels * target).sum(-1) / square, otherwise)
