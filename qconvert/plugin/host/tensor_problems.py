"""What may be wrong with a quantized tensor, in words for the plugin's author."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.quantized import Outliers, QuantizedTensor
from qconvert.ir.scheme import QuantScheme


def tensor_problems(
    tensor: QuantizedTensor, weight_shape: torch.Size, scheme: QuantScheme, *, may_have_outliers: bool
) -> Iterator[str]:
    """Yield what is wrong with what a quantizer made of a weight [out, in].

    It comes in the order in which one check relies on those before it.
    """
    if not isinstance(tensor, QuantizedTensor):
        yield f"it returned {type(tensor).__name__}, not a QuantizedTensor"
    if tensor.scheme != scheme:
        yield f"asked for {scheme}, it quantized to {tensor.scheme}"
    out_features, in_features = weight_shape
    yield from _unlike("q", tensor.q, torch.int8, (out_features, in_features))
    yield from _outside("q", tensor.q, *scheme.code_range)
    yield from _scale_problems(tensor, scheme.scale_shape(out_features, in_features), scheme)
    yield from _zero_point_problems(tensor, scheme.scale_shape(out_features, in_features), scheme)
    if tensor.smoothing_scale is not None:
        problem = smoothing_scale_problem(tensor.smoothing_scale, in_features)
        if problem:
            yield problem
    if tensor.outliers is not None:
        if not may_have_outliers:
            yield "it returned outliers, but does not declare has_outliers"
        yield from _outlier_problems(tensor.outliers, out_features, in_features)


def tuning_problems(tensor: QuantizedTensor, start: QuantizedTensor, weight_shape: torch.Size) -> Iterator[str]:
    """Yield what is wrong with what a tuner made of `start`, in the same order."""
    yield from tensor_problems(tensor, weight_shape, start.scheme, may_have_outliers=True)
    if not _same(tensor.smoothing_scale, start.smoothing_scale):
        yield "its smoothing_scale is another one, but what comes before the layer has been divided by that which it was given"
    before, after = start.outliers, tensor.outliers
    if before is None or after is None:
        unchanged = before is after
    else:
        unchanged = _same(after.columns, before.columns) and _same(after.weight, before.weight)
    if not unchanged:
        yield "its outliers are not those that it was given"


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _scale_problems(tensor: QuantizedTensor, shape: tuple[int, int], scheme: QuantScheme) -> Iterator[str]:
    yield from _unlike("scale", tensor.scale, torch.float32, shape)
    unusable = ~torch.isfinite(tensor.scale)
    if scheme.codebook is None:  # else a group of zeros has a scale of 0
        unusable |= tensor.scale == 0
    if unusable.any():
        row, group = unusable.nonzero()[0].tolist()
        yield f"{int(unusable.sum())} scales are zero or not finite, the first in row {row}, group {group}"
    if (tensor.nested_scale is not None) != scheme.double_quant:
        yield f"nested_scale is {'there' if tensor.nested_scale else 'missing'}, and the scheme is {scheme}"
    if tensor.nested_scale is not None and not torch.equal(tensor.nested_scale.dequantize(), tensor.scale):
        yield "scale is not what nested_scale gives"
    if not torch.equal(affine.round_scale(tensor.scale, scheme), tensor.scale):
        yield "scale is not rounded to what is stored; apply qconvert.plugin.affine.round_scale before computing codes"


def _zero_point_problems(tensor: QuantizedTensor, shape: tuple[int, int], scheme: QuantScheme) -> Iterator[str]:
    if scheme.symmetric:
        if tensor.zero_point is not None:
            yield f"{scheme} is symmetric, but it returned a zero_point"
    elif tensor.zero_point is None:
        yield f"{scheme} is asymmetric, but it returned no zero_point"
    else:
        yield from _unlike("zero_point", tensor.zero_point, torch.int8, shape)
        yield from _outside("zero_point", tensor.zero_point, *scheme.code_range)


def _outlier_problems(outliers: Outliers, out_features: int, in_features: int) -> Iterator[str]:
    columns = outliers.columns
    yield from _unlike("outliers.columns", columns, torch.int64, (len(columns),))
    yield from _outside("outliers.columns", columns, 0, in_features - 1)
    if not (columns[1:] > columns[:-1]).all():
        yield f"outliers.columns are not sorted and unique: {columns.tolist()[:8]}"
    yield from _unlike("outliers.weight", outliers.weight, torch.float32, (out_features, len(columns)))
    if not torch.isfinite(outliers.weight).all():
        yield "outliers.weight is not finite"


def _unlike(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[str]:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        yield f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"


def _outside(name: str, values: Tensor, low: int, high: int) -> Iterator[str]:
    if values.numel():
        smallest, largest = map(int, values.aminmax())
        if smallest < low or largest > high:
            yield f"{name} holds {smallest}..{largest}, outside {low}..{high}"


def smoothing_scale_problem(scale: Tensor, in_features: int) -> str | None:
    """Return what is wrong with the scale of a linear's input channels [in]; None if nothing is."""
    for problem in _unlike("smoothing_scale", scale, torch.float32, (in_features,)):
        return problem
    if not (torch.isfinite(scale) & (scale > 0)).all():
        return "smoothing_scale is not finite and positive"
    return None
