"""QuantizedTensor: the one record that quantizers produce and the writer, exporter and verifier consume."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.double_quant import NestedScale
from qconvert.ir.histogram import WeightHistogram
from qconvert.ir.scheme import PerTensor, QuantScheme


@dataclass(frozen=True, slots=True, eq=False)
class Outliers:
    """Input columns that stay in float beside the int8 matrix (LLM.int8).

    columns: [n] int64, sorted.
    weight: [out, n] float32.
    """

    columns: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """weight [out, in] ~ (q - zero_point) * scale; of a scheme with a codebook values[q] * scale.

    q: [out, in] int8, signed and unpacked; *all* columns, outliers included, so that any loader can use it.
    scale: [out, groups] float32 (per tensor [1, 1]), already rounded to what is stored; may be negative.
    zero_point: like scale, int8; None for symmetric schemes.
    smoothing_scale: [in] float32 or None: q holds `weight * smoothing_scale`, the consumer computes
        `(x / smoothing_scale) @ dequantize(q)^T`. Only what could not be folded has one.
    outliers: columns that consumers which know of them take from `outliers.weight` instead of q.
    nested_scale: what is stored in the place of scale where the scheme has double quantization, and gives it; else None.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: QuantScheme
    smoothing_scale: Tensor | None = None
    outliers: Outliers | None = None
    nested_scale: NestedScale | None = None

    def rows(self, rows: slice) -> QuantizedTensor:
        """Return the quantized tensor of some output channels, to compute with: a nested scale is of all rows, and left out."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or isinstance(self.scheme.granularity, PerTensor) else tensor[rows]

        outliers = self.outliers and Outliers(self.outliers.columns, self.outliers.weight[rows])
        scale = part(self.scale)
        assert scale is not None
        return QuantizedTensor(self.q[rows], scale, part(self.zero_point), self.scheme, self.smoothing_scale, outliers)

    def dequantize(self) -> Tensor:
        """Return float32 [out, in]: what `x @ weight^T` is computed with, outliers and smoothing scale put in."""
        weight = affine.dequantize(self.q, self.scale, self.zero_point, self.scheme)
        if self.outliers is not None:
            weight[:, self.outliers.columns] = self.outliers.weight
        if self.smoothing_scale is not None:
            weight = weight / self.smoothing_scale
        return weight


def stacked(parts: Iterable[QuantizedTensor], rows: int) -> QuantizedTensor:
    """Return the quantized tensor with the rows of all parts, `rows` in all; one part at a time is in memory beside it.

    parts: with a scale per row or group, without outliers, alike in all else.
    """
    whole: QuantizedTensor | None = None
    end = 0
    for part in parts:
        if whole is None:
            zero_point = None if part.zero_point is None else _room(part.zero_point, rows)
            whole = replace(part, q=_room(part.q, rows), scale=_room(part.scale, rows), zero_point=zero_point)
        begin, end = end, end + len(part.q)
        whole.q[begin:end], whole.scale[begin:end] = part.q, part.scale
        if whole.zero_point is not None and part.zero_point is not None:
            whole.zero_point[begin:end] = part.zero_point
    assert whole is not None
    assert end == rows
    return whole


def _room(part: Tensor, rows: int) -> Tensor:
    return torch.empty(rows, *part.shape[1:], dtype=part.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedLayer:
    """A quantized tensor with the name it is for, ||W - dequantize(q)|| / ||W|| (Frobenius), and the weights W and
    dequantize(q) as histograms.
    """

    name: str
    tensor: QuantizedTensor
    relative_error: float
    histogram: WeightHistogram


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedBlock:
    """One finished block.

    layers: its quantized layers.
    tensors: float tensors that differ from the source because a scale was folded into them, by full name.
    """

    name: str
    layers: tuple[QuantizedLayer, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
