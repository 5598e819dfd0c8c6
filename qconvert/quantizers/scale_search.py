"""Scale search: how much to enlarge each input channel of a weight before it is quantized, so that those that matter lose less.

    s = m^a / n^(1-a)

m is the root mean square of each input channel, n the mean of its weights' magnitudes, each relative to the largest of its
group; a is searched on a grid. W diag(s) is quantized, x / s comes in. The least output error tr(D G D^T) wins, with
D = dequantize(quantize(W s)) / s - W and G = E[x x^T].

Source: J. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", section 3.2; n as in
the authors' code. The Gram matrix takes the place of re-running samples: it gives the same output error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.layer import Layer, LinearGroup
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.quantizer import round_to_nearest

ROWS = 256  # output channels that the error is measured on; one exponent for a whole group needs no more


def best_input_scale(group: LinearGroup, schemes: Sequence[QuantScheme], grid: int) -> Tensor | None:
    """The input scale [in] with the least output error of the group's linears, None if none is better than no scale.

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
    best, least = None, _output_error(weights, schemes, gram, None)
    for candidate in _candidates(magnitude, share, grid):
        scale = one_per_channel(candidate, group)  # again: powers of equal numbers may differ in the last bit
        error = _output_error(weights, schemes, gram, scale)
        if error < least:
            best, least = scale, error
    return best


def one_per_channel(values: Tensor, group: LinearGroup) -> Tensor:
    """`values` [in]; inputs that are copies of one producer channel share one scale, so they get their root mean square."""
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
        largest = groups.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        total += (groups / largest).reshape(layer.weight.shape).sum(0)
    return total / sum(len(layer.weight) for layer in layers)


def _candidates(magnitude: Tensor, share: Tensor, grid: int) -> Iterator[Tensor]:
    """s for every exponent, centred on 1 and kept within what float16 tensors can take."""
    magnitude = magnitude.clamp(min=magnitude[magnitude > 0].min())
    for step in range(grid + 1):
        exponent = step / grid
        scale = magnitude.pow(exponent) / (share.pow(1 - exponent) + 1e-4)
        yield (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-3, 1e3)


def _output_error(weights: Sequence[Tensor], schemes: Sequence[QuantScheme], gram: Tensor, scale: Tensor | None) -> float:
    """Sum over the layers of E ||x D^T||^2 = tr(D G D^T), with `scale` [in] put into the weights and taken out again."""
    total = 0.0
    for weight, scheme in zip(weights, schemes, strict=True):
        scaled = weight if scale is None else weight * scale
        difference = round_to_nearest(scaled, scheme).dequantize().sub_(scaled)
        if scale is not None:
            difference /= scale
        total += float(torch.sum((difference @ gram) * difference))
    return total
