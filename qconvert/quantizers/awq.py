"""AWQ: scale the input channels that matter before rounding to nearest, and clip what does not.

    1. Linears that share an input x get one scale s per input channel: W diag(s) is quantized, x / s comes in.
       s = m^a with m the root mean square of each channel; a is searched on a grid for the least output error
       tr(D G D^T), where D = dequantize(quantize(W s)) / s - W and G = E[x x^T].
    2. Each group's range is shrunk by the clip ratio that minimises its weight error weighted by E[x^2].

Source: J. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", sections 3.2 and
5; the Gram matrix takes the place of re-running samples, since it gives the same output error exactly.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qconvert.ir.layer import Layer, LinearGroup
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import PerTensor, QuantScheme
from qconvert.plugin import hookimpl
from qconvert.plugin.observer import Gram
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.quantizers.clip_search import best_clip


@hookimpl
def register_quantizers() -> list[type[Quantizer]]:
    return [AWQQuantizer]


@dataclass(frozen=True)
class AWQQuantizer(Quantizer):
    """Activation-aware weight quantization, weights only.

    grid: the scale search tries exponents that are multiples of 1 / grid, below 1.
    min_clip: smallest clip ratio that is tried; 1 turns clipping off.
    """

    grid: int = 20
    min_clip: float = 0.7

    name = "awq"
    default_scheme = QuantScheme.parse("int4-g32-asym")
    observers = (Gram,)

    def __post_init__(self) -> None:
        if self.grid < 1 or not 0 < self.min_clip <= 1:
            raise ValueError("grid must be at least 1, min_clip above 0 and at most 1")

    def refuses(self, scheme: QuantScheme) -> str | None:
        if scheme.activation_bits:
            return "AWQ quantizes weights only; leave out -a8"
        if isinstance(scheme.granularity, PerTensor):
            return "AWQ needs a scale per channel or group; take -channel or -gN"
        return None

    def prepare(self, group: LinearGroup, schemes: tuple[QuantScheme, ...]) -> LinearGroup:
        if group.stats is None:
            return group
        gram = group.stats.values["gram"]
        magnitude = _shared_by_producer(gram.diagonal().clamp(min=0).sqrt(), group)
        if not bool((magnitude > 0).any()):
            return group

        @cache
        def attempt(step: int) -> tuple[float, Tensor | None]:
            scale = _normalised(magnitude, step / self.grid) if step else None
            return _output_error(group.layers, schemes, gram, scale), scale

        # The error is smooth in the exponent, so every third is tried first, and then what lies around the best.
        coarse = min(range(0, self.grid, 3), key=lambda step: attempt(step)[0])
        around = range(max(coarse - 2, 0), min(coarse + 3, self.grid))
        _, best = attempt(min(around, key=lambda step: attempt(step)[0]))
        return dataclasses.replace(group, input_scale=best)

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        if layer.stats is None:
            return round_to_nearest(layer.weight, scheme)
        energy = layer.stats.values["gram"].diagonal().clamp(min=0)
        ratios = torch.linspace(1.0, self.min_clip, 7).tolist()
        return round_to_nearest(layer.weight, scheme, best_clip(layer.weight, scheme, ratios, energy))


def _shared_by_producer(magnitude: Tensor, group: LinearGroup) -> Tensor:
    """Input channels that are copies of one producer channel get one magnitude, their root mean square."""
    if group.producer is None or group.producer.channels is None:
        return magnitude
    channels = torch.tensor(group.producer.channels)
    size = int(channels.max()) + 1
    total = torch.zeros(size).index_add(0, channels, magnitude.square())
    count = torch.zeros(size).index_add(0, channels, torch.ones_like(magnitude))
    return (total / count.clamp(min=1)).sqrt()[channels]


def _normalised(magnitude: Tensor, exponent: float) -> Tensor:
    """m^a, centred on 1 and kept within what float16 tensors can take."""
    floor = magnitude[magnitude > 0].min()
    scale = magnitude.clamp(min=floor).pow(exponent)
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-3, 1e3)


def _output_error(layers: tuple[Layer, ...], schemes: tuple[QuantScheme, ...], gram: Tensor, scale: Tensor | None) -> float:
    """Sum over the layers of E ||x D^T||^2 = tr(D G D^T), with `scale` [in] put into the weights and taken out again."""
    total = 0.0
    for layer, scheme in zip(layers, schemes, strict=True):
        weight = layer.weight if scale is None else layer.weight * scale
        difference = round_to_nearest(weight, scheme).dequantize().sub_(weight)
        if scale is not None:
            difference /= scale
        total += float(torch.sum((difference @ gram) * difference))
    return total
