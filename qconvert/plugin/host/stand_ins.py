"""What stands in the place of a quantizer in runs that choose no codes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qconvert.ir.layer import Layer
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.trained import Trained
from qconvert.plugin.quantizer import Quantizer
from qconvert.vocabulary import CAST, TRAINED


@dataclass(frozen=True)
class Casting(Quantizer):
    """Has no layers to quantize, and needs no data: floats are rounded where they are written (write/cast.py)."""

    name = CAST
    default_scheme = QuantScheme.parse("int8-channel")

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        """Raise AssertionError: a plan of a cast has no layers."""
        raise AssertionError(f"{layer.name} came to a cast")


@dataclass(frozen=True)
class TrainedCodes(Quantizer):
    """Gives the codes that quantization-aware training has settled on. trained: None until the model is loaded."""

    name = TRAINED
    default_scheme = QuantScheme.parse("int8-channel-a8")
    codebooks = True
    trained: Trained | None = None

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        """Return the layer's codes as they are."""
        assert self.trained is not None
        return replace(self.trained.codes(layer.name), scheme=scheme)


STAND_INS = {kind.name: kind for kind in (Casting, TrainedCodes)}
