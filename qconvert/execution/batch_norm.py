"""A batch norm of images as part of the convolution before it.

norm(conv(x)) = (conv(x) - mean) * factor + shift       factor = gamma / sqrt(variance + epsilon), for each channel
              = x * (weight * factor) + (bias - mean) * factor + shift
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """A batch norm that goes into a convolution.

    norm: the name of its module. mean, variance: its running statistics, [channels] float64.
    """

    norm: str
    mean: Tensor
    variance: Tensor
    epsilon: float

    @staticmethod
    def of(name: str, norm: nn.BatchNorm2d) -> Fold:
        """Return what a norm, the module `name`, does."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        return Fold(name, norm.running_mean.double(), norm.running_var.double(), norm.eps)

    def weight(self, weight: Tensor, gamma: Tensor) -> Tensor:
        """Return a kernel [out, ...] with the norm in it, in float64. gamma: the norm's weight, [channels]."""
        return weight.double() * self._factor(gamma).reshape(-1, *[1] * (weight.ndim - 1))

    def bias(self, bias: Tensor | None, gamma: Tensor, shift: Tensor) -> Tensor:
        """Return a bias [out], or what there is without one, with the norm in it, in float64. shift: the norm's bias."""
        before = torch.zeros_like(self.mean) if bias is None else bias.double()
        return (before - self.mean) * self._factor(gamma) + shift.double()

    def _factor(self, gamma: Tensor) -> Tensor:
        return gamma.double() / torch.sqrt(self.variance + self.epsilon)
