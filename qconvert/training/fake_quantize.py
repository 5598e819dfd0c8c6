"""Fake quantization: values become what their codes stand for, and gradients pass as if nothing had been rounded.

The straight-through estimator: the gradient of round is taken for 1, and that of what the range cuts off is 0 (Y. Bengio et
al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013; B. Jacob et al., "Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018). With a step size that is a parameter, the same
operations have the gradient of S. K. Esser et al., "Learned Step Size Quantization", 2020, eq. 3.

What is computed is the arithmetic of ir/affine.py, bit for bit: the codes of a forward are those that are written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.scheme import QuantScheme


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Return (round(x / scale) + zero_point, kept within low to high, - zero_point) * scale.

    scale, zero_point: of a shape that broadcasts with x. Gradients reach x, and scale where it has one.
    """
    steps = torch.clamp(x / scale, low - zero_point, high - zero_point)
    # The difference is exact, by Sterbenz' lemma or because nothing is left, and so is the sum.
    return (steps + (torch.round(steps) - steps).detach()) * scale


class StraightThrough(torch.autograd.Function):
    """Gives `rounded` in the place of `x`, with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        """Return rounded, like x in shape and dtype."""
        return rounded.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Hand the gradient to x."""
        return gradients[0], None


class StoredStep(torch.autograd.Function):
    """A learned step size as it will be stored, with its gradient made `factor` times smaller."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, scheme: QuantScheme | None, factor: float) -> Tensor:
        """Return the scale as `scheme` stores it; without one it is that of an activation: above 0."""
        ctx.factor = factor
        if scheme is not None:
            return affine.round_scale(scale, scheme)
        return scale.abs().clamp(min=torch.finfo(torch.float32).tiny)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Hand the smaller gradient to the scale."""
        return gradients[0] * ctx.factor, None, None
