"""LLM.int8(): int8 matrices, with the few input columns that carry outliers kept in float.

    y = x[:, O] W[:, O]^T + dequantize(int8(x[:, not O]) int8(W[:, not O])^T)

The columns O are those whose magnitude passes a threshold on calibration data; they are fixed then, because no fast
kernel picks columns at run time. The rest of each row is quantized with one scale of its own.

Source: T. Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qconvert.ir.layer import Layer
from qconvert.ir.quantized import Outliers, QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin import hookimpl
from qconvert.plugin.observer import AbsMax
from qconvert.plugin.quantizer import Quantizer, round_to_nearest


@hookimpl
def register_quantizers() -> list[type[Quantizer]]:
    return [LLMInt8Quantizer]


@dataclass(frozen=True)
class LLMInt8Quantizer(Quantizer):
    """int8 weights and activations, outlier columns in float16.

    threshold: input columns whose magnitude exceeds this on calibration data are outliers.
    max_outliers: at most this many columns per linear, the largest first.
    """

    threshold: float = 6.0
    max_outliers: int = 32

    name = "llm-int8"
    default_scheme = QuantScheme.parse("int8-channel-a8")
    observers = (AbsMax,)
    has_outliers = True

    def __post_init__(self) -> None:
        if self.threshold <= 0 or self.max_outliers < 0:
            raise ValueError("threshold must be above 0, max_outliers at least 0")

    def refuses(self, scheme: QuantScheme) -> str | None:
        if scheme.bits == 8 and scheme.symmetric and scheme.activation_bits == 8:
            return None
        return "LLM.int8() is int8 with int8 activations, symmetric; take int8-channel-a8 or int8-tensor-a8"

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        tensor = round_to_nearest(layer.weight, scheme)
        if layer.stats is None or layer.kind == "conv2d":
            return tensor
        magnitude = layer.stats.values["absmax"]
        largest = magnitude.argsort(descending=True, stable=True)[: self.max_outliers]
        columns = largest[magnitude[largest] > self.threshold].sort().values
        if not len(columns):
            return tensor
        weight = layer.weight[:, columns]
        half = weight.half().float()
        exact_enough = bool(torch.isfinite(half).all())
        return QuantizedTensor(
            tensor.q, tensor.scale, None, scheme, outliers=Outliers(columns, half if exact_enough else weight)
        )
