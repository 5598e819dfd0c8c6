"""What quantizing a layer has done to its weights: the error, and what they look like before and after."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from qconvert.ir import affine, bins
from qconvert.ir.histogram import MOST_BINS, WeightHistogram
from qconvert.ir.layer import Layer
from qconvert.ir.quantized import QuantizedLayer, QuantizedTensor

SIDE = MOST_BINS // 2  # bins on either side of 0
# Weights of a layer that are counted. To count all takes half as long as to round them (SmolLM2, int4-g32: 0.5 s beside 1.0);
# so it is 0.1 s, and what a bin holds of one percent is right to 6 % of itself.
COUNTED = 1 << 15


class Measured:
    """The measures of one layer, of which `add` is shown all rows once, in order, in any number of parts.

    shape: of its weight, [out, in].
    """

    def __init__(self, shape: torch.Size) -> None:
        self._lost = self._total = 0.0
        self._step = max(1, math.ceil(shape.numel() / COUNTED))
        self._rows = 0  # that were added
        self._ends: list[float] = []
        self._counts = torch.zeros(2, MOST_BINS, dtype=torch.int64)
        self._width = bins.LEAST_WIDTH

    def add(self, layer: Layer, tensor: QuantizedTensor) -> None:
        """Measure rows of the layer, in the scaled space that their codes `tensor.q` live in."""
        scaled = dataclasses.replace(tensor, smoothing_scale=None)
        for rows in affine.row_blocks(*layer.weight.shape):
            weight = layer.weight[rows]
            self._lost += _square_norm(scaled.rows(rows).dequantize() - weight)
            self._total += _square_norm(weight)
        every = slice(-self._rows % self._step, None, self._step)
        self._rows += len(layer.weight)
        self._ends += map(float, layer.weight.aminmax())
        self._count(layer.weight[every], scaled.rows(every).dequantize())

    def layer(self, name: str, tensor: QuantizedTensor) -> QuantizedLayer:
        """Return the layer with what was measured; the error of an all-zero weight is 0."""
        error = (self._lost / self._total) ** 0.5 if self._total else 0.0
        (before, after), width, low = bins.to_draw(self._counts, self._width)
        histogram = WeightHistogram(
            low=low,
            width=width,
            before=tuple(before.tolist()),
            after=tuple(after.tolist()),
            step=self._step,
            minimum=min(self._ends),
            maximum=max(self._ends),
        )
        return QuantizedLayer(name, tensor, error, histogram)

    def _count(self, *weights: Tensor) -> None:
        """Count the weights before and after, [rows, in]."""
        finite = [each.reshape(-1).nan_to_num() for each in weights]  # a code of the largest floats may stand for more
        for values in filter(Tensor.numel, finite):
            self._widen(*map(float, values.aminmax()))
        self._counts += torch.stack([bins.counted(values, self._width, SIDE) for values in finite])

    def _widen(self, minimum: float, maximum: float) -> None:
        """Make the bins as wide as these numbers need."""
        width = max(self._width, bins.least_width(minimum, maximum, SIDE))
        self._counts, self._width = bins.widened(self._counts, width / self._width), width


def _square_norm(values: Tensor) -> float:
    """Return the squared norm in float64: squares of what float32 holds over- and underflow it."""
    return float(values.double().square_().sum())
