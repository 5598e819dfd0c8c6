"""Zero-point: asymmetric round-to-nearest over the range of the weights.

    scale      = (max - min) / (2^bits - 1)
    zero_point = -round(min / scale) - 2^(bits-1)
    q          = round(w / scale) + zero_point

The range always holds 0, so that 0 maps back to exactly 0; zero points are integers, because kernels want them.

Source: T. Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", section 2.1 (zeropoint).
"""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.ir.layer import Layer
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin import hookimpl
from qconvert.plugin.quantizer import Quantizer
from qconvert.quantizers.clipped_range import ClippedRange


@hookimpl
def register_quantizers() -> list[type[Quantizer]]:
    """Register zero-point."""
    return [ZeroPointQuantizer]


@dataclass(frozen=True)
class ZeroPointQuantizer(ClippedRange, Quantizer):
    """Asymmetric round-to-nearest. Needs no data; options: see ClippedRange."""

    name = "zero-point"
    default_scheme = QuantScheme.parse("int8-tensor-asym-a8")
    by_rows = True

    def refuses(self, scheme: QuantScheme) -> str | None:
        """Refuse symmetric schemes."""
        return "zero-point is asymmetric; add -asym, or take absmax" if scheme.symmetric else None

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        """Round the weight to the nearest codes of the range that `clip` asks for."""
        return self.rounded(layer.weight, scheme)
