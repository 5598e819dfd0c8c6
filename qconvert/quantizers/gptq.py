"""GPTQ: rounding that makes up for its own errors (quantizers/compensation.py), on AWQ's scales and clips.

Source: E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from qconvert.ir.layer import Layer, LinearGroup
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import PerTensor, QuantScheme
from qconvert.plugin import hookimpl
from qconvert.plugin.observer import Gram
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.quantizers.clip_search import round_clipped
from qconvert.quantizers.compensation import DAMP, compensated
from qconvert.quantizers.scale_search import best_smoothing_scale


@hookimpl
def register_quantizers() -> list[type[Quantizer]]:
    """Register gptq."""
    return [GPTQQuantizer]


@dataclass(frozen=True)
class GPTQQuantizer(Quantizer):
    """Rounding that makes up for its own errors, weights only.

    act_order: columns with much energy first.
    damp: how much the mean energy is added to every column's.
    scale: search AWQ's smoothing scales first.
    grid: that search tries exponents that are multiples of 1 / grid.
    min_clip: smallest clip ratio that is tried; 1 turns clipping off.
    """

    act_order: bool = False
    damp: float = DAMP
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
        """Refuse int8 activations, and one scale per tensor."""
        if scheme.activations and not scheme.is_static:
            return "GPTQ quantizes weights only; leave out -a8"
        if isinstance(scheme.granularity, PerTensor):
            return "GPTQ needs a scale per channel or group; take -channel or -gN"
        return None

    def prepare(self, group: LinearGroup, schemes: tuple[QuantScheme, ...]) -> LinearGroup:
        """Search a smoothing scale as AWQ does, where the option `scale` asks for it."""
        if not self.scale:
            return group
        return dataclasses.replace(group, smoothing_scale=best_smoothing_scale(group, schemes, self.grid))

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        """Round column by column, later ones making up for the errors of earlier ones; without statistics, to the nearest
        codes.
        """
        if layer.stats is None:
            return round_to_nearest(layer.weight, scheme)
        gram = layer.stats.values[Gram.name]
        nearest = round_clipped(layer.weight, scheme, gram.diagonal().clamp(min=0), self.min_clip)
        return compensated(layer.weight, nearest, gram, damp=self.damp, act_order=self.act_order)
