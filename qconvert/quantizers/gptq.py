"""GPTQ: quantize one input column after another, and let the columns that are left make up for the error.

    H = G + damp * mean(diag G) I,  G = E[x x^T]
    U = upper Cholesky factor of H^-1, its rows divided by U_jj
    for each column j:  e = w_j - q_j;  w_k -= e U_jk for k > j

The columns run in blocks, so that most of the updates are matrix products. Scales and zero points are fixed before, by AWQ's
scale and clip searches: no layout has a place for groups of re-ordered columns, so `act_order` re-orders the columns' turns,
not their groups ("static groups").

Rows of x count relative to the block's output (see Observer); with plain rows a few massive tokens rule G, and GPTQ gains
nothing on such models. A strong damp pays: 0.3 to 1 gave 0.065 KL on SmolLM2, 0.01 gave 0.080.

Source: E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.ir.layer import Layer, LinearGroup
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import PerTensor, QuantScheme
from qconvert.plugin import hookimpl
from qconvert.plugin.observer import Gram
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.quantizers.clip_search import round_clipped
from qconvert.quantizers.scale_search import best_input_scale

COLUMNS = 64  # columns per block of updates


@hookimpl
def register_quantizers() -> list[type[Quantizer]]:
    return [GPTQQuantizer]


@dataclass(frozen=True)
class GPTQQuantizer(Quantizer):
    """Rounding that makes up for its own errors, weights only.

    act_order: columns with much energy first.
    damp: how much the mean energy is added to every column's.
    scale: search AWQ's input scales first.
    grid: that search tries exponents that are multiples of 1 / grid.
    min_clip: smallest clip ratio that is tried; 1 turns clipping off.
    """

    act_order: bool = False
    damp: float = 0.5
    scale: bool = True
    grid: int = 10
    min_clip: float = 0.7

    name = "gptq"
    default_scheme = QuantScheme.parse("int4-g32-asym")
    observers = (Gram,)

    def __post_init__(self) -> None:
        if self.grid < 1 or not 0 < self.min_clip <= 1 or self.damp <= 0:
            raise ValueError("grid must be at least 1, damp above 0, min_clip above 0 and at most 1")

    def refuses(self, scheme: QuantScheme) -> str | None:
        if scheme.activation_bits:
            return "GPTQ quantizes weights only; leave out -a8"
        if isinstance(scheme.granularity, PerTensor):
            return "GPTQ needs a scale per channel or group; take -channel or -gN"
        return None

    def prepare(self, group: LinearGroup, schemes: tuple[QuantScheme, ...]) -> LinearGroup:
        if not self.scale:
            return group
        return dataclasses.replace(group, input_scale=best_input_scale(group, schemes, self.grid))

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        if layer.stats is None:
            return round_to_nearest(layer.weight, scheme)
        gram = layer.stats.values["gram"]
        energy = gram.diagonal().clamp(min=0)
        nearest = round_clipped(layer.weight, scheme, energy, self.min_clip)
        if not bool((energy > 0).any()):
            return nearest
        order = energy.argsort(descending=True, stable=True) if self.act_order else torch.arange(len(energy))
        damped = gram[order][:, order] + self.damp * energy.mean() * torch.eye(len(energy))
        factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        factor /= factor.diagonal().clone()[:, None]
        return dataclasses.replace(nearest, q=_compensated(layer.weight, nearest, factor, order))


def _compensated(weight: Tensor, nearest: QuantizedTensor, factor: Tensor, order: Tensor) -> Tensor:
    """Codes [out, in] of `weight` on the grid of `nearest`, columns in `order`, errors handed on by `factor` [in, in].

    Works on the transposed weight: what belongs to a column is then contiguous.
    """
    scheme, width = nearest.scheme, weight.shape[1]
    group_of = order // scheme.group_size(width)
    scales = nearest.scale.T.contiguous()
    zero_points = None if nearest.zero_point is None else nearest.zero_point.T.float().contiguous()
    low, high = scheme.code_range
    columns = weight.T[order].contiguous()
    codes = torch.empty(columns.shape, dtype=torch.int8)
    for start in range(0, width, COLUMNS):
        end = min(start + COLUMNS, width)
        errors = torch.empty_like(columns[start:end])
        for column in range(start, end):
            group = int(group_of[column])
            zero_point = 0.0 if zero_points is None else zero_points[group]
            code = torch.round(columns[column] / scales[group]).add_(zero_point).clamp_(low, high)
            error = columns[column] - (code - zero_point) * scales[group]
            columns[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
            codes[column], errors[column - start] = code.to(torch.int8), error
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes[order.argsort()].T.contiguous()
