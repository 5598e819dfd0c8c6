"""The place of a quantizer in a run that quantizes nothing: floats are rounded where they are written (write/cast.py)."""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.ir.layer import Layer
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.quantizer import Quantizer
from qconvert.vocabulary import CAST


@dataclass(frozen=True)
class Casting(Quantizer):
    """Has no layers to quantize, and needs no data."""

    name = CAST
    default_scheme = QuantScheme.parse("int8-channel")

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        """Raise AssertionError: a plan of a cast has no layers."""
        raise AssertionError(f"{layer.name} came to a cast")
