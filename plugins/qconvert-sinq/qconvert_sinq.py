"""SINQ: rows and columns of a weight are balanced before it is rounded, so that an outlier spoils neither of them.

    W_ij = r_i B_ij c_j          B is rounded to nearest; 1 / c is the smoothing scale, r goes into the scales of the groups
    imbalance(B) = max std / min std, over all rows and columns of B
    alternate    c_j *= std(column j of B)          r_i *= std(row i of B)

The iterate with the least imbalance is kept. Needs no data.

What differs from the paper: it balances every matrix by itself; here linears that share an input get one c, as only that can be
folded into what produces it. Groups have a scale for each row already, and rounding to nearest commutes with a factor of a
row (up to the rounding of scales), so r is never stored. The authors' code bounds the ratios of every step; here c itself is
bounded. Where c can't be folded and the layout keeps no smoothing scales, a linear is just rounded to nearest.

Source: L. K. Müller et al., "SINQ: Sinkhorn-Normalized Quantization for Calibration-Free Low-Precision LLM Weights", 2025,
arXiv 2509.22944.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.plugin import (
    Layer,
    LinearGroup,
    PerTensor,
    QuantizedTensor,
    Quantizer,
    QuantScheme,
    hookimpl,
    round_to_nearest,
)

CONSTANT = 1e-6  # a row or column whose deviation is below this share of the largest holds nothing to balance


@hookimpl
def register_quantizers() -> list[type[Quantizer]]:
    """Register sinq."""
    return [SINQQuantizer]


@dataclass(frozen=True)
class SINQQuantizer(Quantizer):
    """Sinkhorn-normalized quantization, weights only. Needs no data.

    iterations: how often columns and rows are normalized; 0 rounds to nearest.
    bound: smoothing scales stay between 1 / bound and bound.
    """

    iterations: int = 16
    bound: float = 1e3

    name = "sinq"
    default_scheme = QuantScheme.parse("int4-g32-asym")

    def __post_init__(self) -> None:
        if self.iterations < 0 or not 1 <= self.bound <= 1e4:
            raise ValueError("iterations must be at least 0, bound at least 1 and at most 10000")

    def refuses(self, scheme: QuantScheme) -> str | None:
        """Refuse int8 activations, and one scale per tensor."""
        if scheme.activations:
            return "SINQ quantizes weights only; leave out -a8"
        if isinstance(scheme.granularity, PerTensor):
            return "SINQ needs a scale per channel or group; take -channel or -gN"
        return None

    def prepare(self, group: LinearGroup, schemes: tuple[QuantScheme, ...]) -> LinearGroup:
        """Set 1 / c as the smoothing scale, unless the weight is balanced best without."""
        weight = torch.cat([layer.weight for layer in group.layers])
        copies = group.producer.channels if group.producer else None
        channels = torch.arange(weight.shape[1]) if copies is None else torch.tensor(copies)
        columns = balancing_columns(weight, channels, self.iterations, self.bound)
        return group if columns is None else dataclasses.replace(group, smoothing_scale=1 / columns)

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        """Round to the nearest codes: a factor of a row would change nothing but its scales."""
        return round_to_nearest(layer.weight, scheme)


def balancing_columns(weight: Tensor, channels: Tensor, iterations: int, bound: float) -> Tensor | None:
    """Return the c [in] that leaves the least imbalance in weight [out, in]; None if that is all ones.

    channels: [in], inputs with the same number are copies of one channel and get one c.
    """
    weight = weight / weight.abs().max().clamp(min=torch.finfo(torch.float32).tiny)  # so that no square overflows
    columns, best = torch.ones(weight.shape[1]), None
    balanced = normalized_rows(weight)
    least = imbalance(balanced)
    for _ in range(iterations):
        columns = _tied(columns * _deviations(balanced, 0), channels).clamp(1 / bound, bound)
        balanced = normalized_rows(weight / columns)
        if (reached := imbalance(balanced)) < least:
            least, best = reached, columns
    return best


def normalized_rows(weight: Tensor) -> Tensor:
    """Return weight [out, in] with a standard deviation of 1 in each row."""
    return weight / _deviations(weight, 1)[:, None]


def imbalance(weight: Tensor) -> float:
    """Return the largest standard deviation of a row or column of weight [out, in] over the smallest but for constants."""
    deviations = torch.cat([weight.std(dim, correction=0) for dim in (0, 1)])
    deviations = deviations[deviations > CONSTANT * deviations.max()]
    return float(deviations.max() / deviations.min()) if len(deviations) else 1.0


def _deviations(weight: Tensor, dim: int) -> Tensor:
    """Standard deviations over `dim`, 1 for what is constant."""
    deviations = weight.std(dim, correction=0)
    return torch.where(deviations > CONSTANT * deviations.max(), deviations, torch.ones_like(deviations))


def _tied(columns: Tensor, channels: Tensor) -> Tensor:
    """Return columns [in], the geometric mean of each channel's copies for all of them, around a geometric mean of 1."""
    logs = columns.log()
    means = torch.zeros(int(channels.max()) + 1).scatter_reduce(0, channels, logs, "mean", include_self=False)
    tied = means[channels]
    return (tied - tied.mean()).exp()
