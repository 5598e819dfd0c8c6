"""Per-channel: round-to-nearest with one scale per output channel, or per group of inputs within it.

A channel with large weights then costs the others no resolution.

Source: R. Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: A whitepaper", section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.ir.layer import Layer
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import PerTensor, QuantScheme
from qconvert.plugin import hookimpl
from qconvert.plugin.quantizer import Quantizer
from qconvert.quantizers.clipped_range import ClippedRange


@hookimpl
def register_quantizers() -> list[type[Quantizer]]:
    """Register per-channel."""
    return [PerChannelQuantizer]


@dataclass(frozen=True)
class PerChannelQuantizer(ClippedRange, Quantizer):
    """Round-to-nearest per output channel or group, symmetric or not. Needs no data; options: see ClippedRange."""

    name = "per-channel"
    default_scheme = QuantScheme.parse("int8-channel-a8")
    by_rows = True

    def refuses(self, scheme: QuantScheme) -> str | None:
        """Refuse one scale per tensor."""
        if isinstance(scheme.granularity, PerTensor):
            return "per-channel has no scale per tensor; take -channel or -gN, or the quantizers absmax and zero-point"
        return None

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        """Round the weight to the nearest codes of the range that `clip` asks for."""
        return self.rounded(layer.weight, scheme)
