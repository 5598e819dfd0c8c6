"""Scale search: how much to enlarge each input channel of a weight before it is quantized, so that those that matter lose less.

    s = m^a / n^(1-a)

m is the root mean square of each input channel, n the mean of its weights' magnitudes, each relative to the largest of its
group; a is searched on a grid. W diag(s) is quantized, x / s comes in. The least output error tr(D G D^T) wins, with
D = dequantize(quantize(W s)) / s - W and G = E[x x^T].

Source: J. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", section 3.2; n as in
the authors' code. The Gram matrix takes the place of re-running samples: it gives the same output error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.layer import Layer, LinearGroup
from qconvert.ir.scheme import QuantScheme

ROWS = 256  # output channels that the error is measured on; one exponent for a whole group needs no more


def best_smoothing_scale(group: LinearGroup, schemes: Sequence[QuantScheme], grid: int) -> Tensor | None:
    """Return the smoothing scale [in] with the least output error of the group's linears, None if none is better than no scale.

    schemes: of the layers, in order. grid: the exponents are multiples of 1 / grid, from 0 to 1.
    """
    if group.stats is None:
        return None
    gram = group.stats.values["gram"]
    magnitude = gram.diagonal().clamp(min=0).sqrt()
    if not bool((magnitude > 0).any()):
        return None
    weights = [layer.weight[:: -(-len(layer.weight) // ROWS)] for layer in group.layers]
    magnitude = one_per_channel(magnitude, group)
    share = one_per_channel(_share_of_group(group.layers, schemes), group)

    def attempt(exponent: float | None) -> tuple[float, Tensor | None]:
        if exponent is None:
            return _output_error(weights, schemes, gram, None), None
        # One per channel again: powers of equal numbers may differ in the last bit.
        scale = one_per_channel(_scale(magnitude, share, exponent), group)
        return _output_error(weights, schemes, gram, scale), scale

    return best_of_grid(grid, attempt)


def best_of_grid(grid: int, attempt: Callable[[float | None], tuple[float, Tensor | None]]) -> Tensor | None:
    """Return the scale with the least error over the multiples of 1 / grid from 0 to 1.

    attempt: exponent -> (error, scale); of None, what there is without a scale. The error is smooth in the exponent, so every
    third is tried first, and then what lies around the best.
    """
    tried = cache(lambda step: attempt(None if step is None else step / grid))
    coarse = min(range(0, grid + 1, 3), key=lambda step: tried(step)[0])
    around = range(max(coarse - 2, 0), min(coarse + 2, grid) + 1)
    _, best = tried(min((None, *around), key=lambda step: tried(step)[0]))
    return best


def one_per_channel(values: Tensor, group: LinearGroup) -> Tensor:
    """Return `values` [in], in which inputs that are copies of one producer channel all have their root mean square."""
    if group.producer is None or group.producer.channels is None:
        return values
    channels = torch.tensor(group.producer.channels)
    size = int(channels.max()) + 1
    total = torch.zeros(size).index_add(0, channels, values.square())
    count = torch.zeros(size).index_add(0, channels, torch.ones_like(values))
    return (total / count.clamp(min=1)).sqrt()[channels]


def _share_of_group(layers: Sequence[Layer], schemes: Sequence[QuantScheme]) -> Tensor:
    """n: mean over all output channels of |w| / the largest |w| of its group, [in]."""
    total = torch.zeros(layers[0].weight.shape[1])
    for layer, scheme in zip(layers, schemes, strict=True):
        groups = affine.grouped(layer.weight.abs(), scheme)
        groups /= groups.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        total += groups.reshape(layer.weight.shape).sum(0)
    return total / sum(len(layer.weight) for layer in layers)


def _scale(magnitude: Tensor, share: Tensor, exponent: float) -> Tensor:
    """s, centred on 1 and kept within what float16 tensors can take."""
    magnitude = magnitude.clamp(min=magnitude[magnitude > 0].min())
    scale = magnitude.pow(exponent) / (share.pow(1 - exponent) + 1e-4)
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-3, 1e3)


def _output_error(weights: Sequence[Tensor], schemes: Sequence[QuantScheme], gram: Tensor, scale: Tensor | None) -> float:
    """Sum over the layers of E ||x D^T||^2 = tr(D G D^T), with `scale` [in] put into the weights and taken out again."""
    total = 0.0
    for weight, scheme in zip(weights, schemes, strict=True):
        scaled = weight if scale is None else weight * scale
        difference = affine.rounded(scaled, scheme).sub_(scaled)
        if scale is not None:
            difference /= scale
        total += float(torch.sum((difference @ gram) * difference))
    return total
