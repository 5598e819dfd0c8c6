"""AWQ: scale the input channels that matter before rounding to nearest, and clip what does not.

    1. Linears that share an input get one scale per input channel, searched for the least output error (scale_search.py).
    2. Each group's range is shrunk by the clip ratio that minimises its weight error weighted by E[x^2].

Source: J. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", sections 3.2 and 5.
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
from qconvert.quantizers.scale_search import best_smoothing_scale


@hookimpl
def register_quantizers() -> list[type[Quantizer]]:
    """Register awq."""
    return [AWQQuantizer]


@dataclass(frozen=True)
class AWQQuantizer(Quantizer):
    """Activation-aware weight quantization, weights only.

    grid: the scale search tries exponents that are multiples of 1 / grid.
    min_clip: smallest clip ratio that is tried; 1 turns clipping off.
    """

    grid: int = 10
    min_clip: float = 0.7

    name = "awq"
    default_scheme = QuantScheme.parse("int4-g32-asym")
    observers = (Gram,)
    by_rows = True

    def __post_init__(self) -> None:
        if self.grid < 1 or not 0 < self.min_clip <= 1:
            raise ValueError("grid must be at least 1, min_clip above 0 and at most 1")

    def refuses(self, scheme: QuantScheme) -> str | None:
        """Refuse int8 activations, and one scale per tensor."""
        if scheme.activations and not scheme.is_static:
            return "AWQ quantizes weights only; leave out -a8"
        if isinstance(scheme.granularity, PerTensor):
            return "AWQ needs a scale per channel or group; take -channel or -gN"
        return None

    def prepare(self, group: LinearGroup, schemes: tuple[QuantScheme, ...]) -> LinearGroup:
        """Search the smoothing scale with the least output error, unless no scale is best."""
        return dataclasses.replace(group, smoothing_scale=best_smoothing_scale(group, schemes, self.grid))

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        """Round to the nearest codes of clipped ranges; without statistics, of the full ones."""
        if layer.stats is None:
            return round_to_nearest(layer.weight, scheme)
        energy = layer.stats.values["gram"].diagonal().clamp(min=0)
        return round_clipped(layer.weight, scheme, energy, self.min_clip)
