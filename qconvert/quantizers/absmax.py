"""Absmax: symmetric round-to-nearest, the scale set by the largest magnitude.

    scale = max |w| / 127          int8
    scale = w[argmax |w|] / -8     int4, by the signed maximum
    q     = round(w / scale)

Source: T. Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", section 2.1 (absmax).
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
    """Register absmax."""
    return [AbsMaxQuantizer]


@dataclass(frozen=True)
class AbsMaxQuantizer(ClippedRange, Quantizer):
    """Symmetric round-to-nearest. Needs no data; options: see ClippedRange."""

    name = "absmax"
    default_scheme = QuantScheme.parse("int8-tensor-a8")
    by_rows = True

    def refuses(self, scheme: QuantScheme) -> str | None:
        """Refuse asymmetric schemes."""
        return None if scheme.symmetric else "absmax has no zero point; zero-point and per-channel have one"

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        """Round the weight to the nearest codes of the range that `clip` asks for."""
        return self.rounded(layer.weight, scheme)
