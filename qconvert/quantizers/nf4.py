"""NF4: each weight becomes the nearest of 16 numbers, which lie as densely as normally distributed weights do.

    scale = max |w|                                   of each group
    q     = argmin |w / scale - values[q]|            values of 4-bit NormalFloat, or with fp4 those of a 4-bit float

Codes and scales are those of bitsandbytes, bit for bit, which QLoRA trains adapters on. With -dq the scales are quantized
in their turn, to 8 bits.

Source: T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.ir.layer import Layer
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import PerGroup, QuantScheme
from qconvert.plugin import hookimpl
from qconvert.plugin.quantizer import Quantizer, round_to_nearest


@hookimpl
def register_quantizers() -> list[type[Quantizer]]:
    """Register nf4."""
    return [NF4Quantizer]


@dataclass(frozen=True)
class NF4Quantizer(Quantizer):
    """Round to nearest in the codebooks of bitsandbytes, weights only. Needs no data."""

    name = "nf4"
    default_scheme = QuantScheme.parse("nf4-g64")
    by_rows = True
    codebooks = True

    def refuses(self, scheme: QuantScheme) -> str | None:
        """Refuse int8 activations, and codebooks without groups."""
        if scheme.activations:
            return f"nf4 quantizes weights only; leave out -{scheme.activations}"
        if scheme.codebook is not None and not isinstance(scheme.granularity, PerGroup):
            return "a codebook has a scale per group; take -gN"
        return None

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        """Round the weight to the nearest numbers of the codebook, or of the integers that a rule may give a layer."""
        return round_to_nearest(layer.weight, scheme)
