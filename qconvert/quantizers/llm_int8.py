"""LLM.int8(): int8 matrices, with the few input columns that carry outliers kept in float.

    y = x[:, O] W[:, O]^T + dequantize(int8(x[:, not O]) int8(W[:, not O])^T)

The columns O are chosen on calibration data, by the error that they save or by a threshold on their magnitude; they are
fixed then, because no fast kernel picks columns at run time. The rest of each row is quantized with one scale of its own.

Source: T. Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", section 3, which takes the
columns above 6.0.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qconvert.ir.layer import CalibrationStats, Layer
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin import hookimpl
from qconvert.plugin.observer import AbsMax, SampledRows
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.quantizers.outlier_search import by_magnitude, columns_that_pay, with_outliers


@hookimpl
def register_quantizers() -> list[type[Quantizer]]:
    """Register llm-int8."""
    return [LLMInt8Quantizer]


@dataclass(frozen=True)
class LLMInt8Quantizer(Quantizer):
    """int8 weights and activations, outlier columns in float16.

    threshold: input columns whose magnitude exceeds this on calibration data are outliers; null: those that save enough
        error of the rows.
    max_outliers: at most this many columns per linear, the largest first.
    """

    threshold: float | None = None
    max_outliers: int = 32

    name = "llm-int8"
    default_scheme = QuantScheme.parse("int8-channel-a8")
    observers = (AbsMax, SampledRows)

    def __post_init__(self) -> None:
        if (self.threshold is not None and self.threshold <= 0) or self.max_outliers < 0:
            raise ValueError("threshold must be above 0, max_outliers at least 0")

    @property
    def has_outliers(self) -> bool:
        """Whether any column may stay in float, which `max_outliers` limits."""
        return self.max_outliers > 0

    def refuses(self, scheme: QuantScheme) -> str | None:
        """Refuse all but symmetric int8 with dynamic int8 activations."""
        if scheme.bits == 8 and scheme.symmetric and scheme.activations and not scheme.is_static:
            return None
        return "LLM.int8() is int8 with int8 activations, symmetric; take int8-channel-a8 or int8-tensor-a8"

    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        """Round to the nearest codes, and keep the outlier columns beside them; a convolution has none."""
        tensor = round_to_nearest(layer.weight, scheme)
        if layer.stats is None or layer.kind == "conv2d":
            return tensor
        return with_outliers(tensor, layer.weight, self._columns(layer.stats))

    def _columns(self, stats: CalibrationStats) -> Tensor:
        """The outlier columns [n], sorted; a matter of the input alone, so that linears that share one share them."""
        if self.threshold is None:
            return columns_that_pay(stats, self.max_outliers)
        largest = by_magnitude(stats)[: self.max_outliers]
        return largest[stats.values[AbsMax.name][largest] > self.threshold].sort().values
