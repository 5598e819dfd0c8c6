"""SmoothQuant: move the outliers of activations into the weights, so that int8 rows resolve what lies beside them.

    s_j = max |x_j|^a / max |w_j|^(1-a)         W diag(s) is quantized, x / s comes in

over calibration data and all linears that share the input x. The exponent a is searched on a grid for the least error of
what the kernels compute from sampled rows, no scale at all included:

    || x W^T - rows(x / s) dequantize(quantize(W diag(s)))^T ||^2       rows: one int8 scale per row

Then each column of the weights makes up for the errors of those before it (quantizers/compensation.py): rounding to nearest
is more than half of what MiniLM loses. On request, columns that are still outliers stay in float, as in LLM.int8().

Source: G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", section 4;
there the exponent is one for the whole model, and weights are rounded to nearest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.layer import Layer, LinearGroup
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin import hookimpl
from qconvert.plugin.observer import AbsMax, Gram, SampledRows
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.quantizers.compensation import DAMP, compensated
from qconvert.quantizers.outlier_search import columns_that_pay, with_outliers
from qconvert.quantizers.row_quantization import quantized_rows
from qconvert.quantizers.scale_search import best_of_grid


@hookimpl
def register_quantizers() -> list[type[Quantizer]]:
    """Register smoothquant."""
    return [SmoothQuantQuantizer]


@dataclass(frozen=True)
class SmoothQuantQuantizer(Quantizer):
    """int8 weights and activations, input channels scaled so that both lose little.

    grid: the search tries exponents that are multiples of 1 / grid, from 0 to 1.
    max_outliers: at most this many columns per linear stay in float where they still pay; 0 turns that off.
    damp: weights are rounded as GPTQ does, with this much of the mean energy added to every column's; null: to nearest, which
        takes less time.
    """

    grid: int = 20
    max_outliers: int = 0
    damp: float | None = DAMP

    name = "smoothquant"
    default_scheme = QuantScheme.parse("int8-channel-a8")
    observers = (AbsMax, SampledRows, Gram)

    def __post_init__(self) -> None:
        if self.grid < 1 or self.max_outliers < 0 or (self.damp is not None and self.damp <= 0):
            raise ValueError("grid must be at least 1, max_outliers at least 0, damp above 0")

    @property
    def has_outliers(self) -> bool:
        """Whether any column may stay in float, which `max_outliers` limits."""
        return self.max_outliers > 0

    def refuses(self, scheme: QuantScheme) -> str | None:
        """Refuse weights of less than 8 bits."""
        if scheme.bits == 8:
            return None
        return "SmoothQuant makes weights harder to quantize, for int8 activations' sake; take int8, or awq for int4"

    def prepare(self, group: LinearGroup, schemes: tuple[QuantScheme, ...]) -> LinearGroup:
        """Choose the migration strength with the least output error, and set its smoothing scale."""
        if group.stats is None:
            return group
        rows = group.stats.values[SampledRows.name]
        channels = _producer_channels(group, rows.shape[1])
        inputs = _largest(group.stats.values[AbsMax.name], channels)
        weights = _largest(torch.stack([layer.weight.abs().amax(0) for layer in group.layers]).amax(0), channels)
        if not (inputs.any() and weights.any()):
            return group
        wanted = [rows @ layer.weight.T for layer in group.layers]

        def attempt(exponent: float | None) -> tuple[float, Tensor | None]:
            scale = None if exponent is None else _scale(inputs, weights, exponent)[channels]
            return _output_error(group, schemes, rows, wanted, scale), scale

        return dataclasses.replace(group, smoothing_scale=best_of_grid(self.grid, attempt))

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        """Round to the nearest codes, compensated where `damp` is set, and keep the outlier columns that pay beside them."""
        tensor = round_to_nearest(layer.weight, scheme)
        if layer.stats is None:
            return tensor
        with_columns = layer.kind != "conv2d" and scheme.activations and not scheme.is_static
        columns = columns_that_pay(layer.stats, self.max_outliers if with_columns else 0)
        if self.damp is not None:
            gram = layer.stats.values[Gram.name].clone()
            gram[columns], gram[:, columns] = 0, 0  # the int8 product does not read them
            tensor = compensated(layer.weight, tensor, gram, damp=self.damp)
        return with_outliers(tensor, layer.weight, columns)


def _producer_channels(group: LinearGroup, width: int) -> Tensor:
    """Return of which producer channel each input channel [in] is a copy: copies get one scale."""
    copies = group.producer.channels if group.producer else None
    return torch.arange(width) if copies is None else torch.tensor(copies)


def _largest(magnitude: Tensor, channels: Tensor) -> Tensor:
    """Return the largest magnitude that each producer channel has among its copies [in]."""
    return torch.zeros(int(channels.max()) + 1).scatter_reduce(0, channels, magnitude, "amax")


def _scale(inputs: Tensor, weights: Tensor, exponent: float) -> Tensor:
    """inputs^a / weights^(1-a), centred on 1 and kept within what float16 tensors can take."""
    scale = _positive(inputs).pow(exponent) / _positive(weights).pow(1 - exponent)
    return (scale / scale.max().sqrt() / scale.min().sqrt()).clamp(1e-3, 1e3)


def _positive(magnitude: Tensor) -> Tensor:
    """Channels that hold nothing count like the smallest that holds something."""
    return magnitude.clamp(min=magnitude[magnitude > 0].min())


def _output_error(
    group: LinearGroup,
    schemes: tuple[QuantScheme, ...],
    rows: Tensor,
    wanted: Sequence[Tensor],
    scale: Tensor | None,
) -> float:
    """Squared error over the outputs `wanted` [n, out] of `rows` [n, in], with `scale` [in] put into the weights."""
    smoothed = rows if scale is None else rows / scale
    seen = quantized_rows(smoothed, made_by=group.stats.made_by if group.stats and scale is None else None)
    total = 0.0
    for layer, scheme, output in zip(group.layers, schemes, wanted, strict=True):
        scaled = layer.weight if scale is None else layer.weight * scale
        weight = affine.rounded(scaled, scheme)
        total += float(((seen if scheme.activations else smoothed) @ weight.T).sub_(output).square_().sum())
    return total if math.isfinite(total) else math.inf  # products of huge weights may overflow
