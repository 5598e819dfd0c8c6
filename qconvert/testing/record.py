"""Checks of the record that `quantize` returns, and of what `prepare` does, one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.layer import LinearGroup
from qconvert.ir.quantized import QuantizedTensor
from qconvert.plugin.quantizer import Quantizer
from qconvert.testing.failure import CheckFailure, place
from qconvert.testing.samples import returned, schemes_of, typical


def check_returns_quantized_tensor(quantizer: Quantizer) -> None:
    """`quantize` returns a QuantizedTensor: the writer, the exporter and the verifier read nothing else."""
    for layer, scheme, tensor in returned(quantizer, typical()):
        if not isinstance(tensor, QuantizedTensor):
            raise CheckFailure(f"{place(layer, scheme)}: it returned a {type(tensor).__name__}")


def check_keeps_scheme(quantizer: Quantizer) -> None:
    """The result has the scheme that was asked for: the plan has promised sizes and kernels for that one."""
    for layer, scheme, tensor in returned(quantizer, typical()):
        if tensor.scheme != scheme:
            raise CheckFailure(f"{place(layer, scheme)}: it quantized to {tensor.scheme}")


def check_codes_have_shape(quantizer: Quantizer) -> None:
    """Codes q are int8 [out, in]: one per weight, unpacked, outlier columns included."""
    for layer, scheme, tensor in returned(quantizer, typical()):
        _require(place(layer, scheme), "q", tensor.q, torch.int8, tuple(layer.weight.shape))


def check_codes_in_range(quantizer: Quantizer) -> None:
    """Codes lie in the scheme's range: packing keeps only that many bits of each."""
    for layer, scheme, tensor in returned(quantizer, typical()):
        _require_range(place(layer, scheme), "q", tensor.q, *scheme.code_range)


def check_scale_has_shape(quantizer: Quantizer) -> None:
    """A scale is float32 [out, groups], per tensor [1, 1]: one form for every granularity."""
    for layer, scheme, tensor in returned(quantizer, typical()):
        _require(place(layer, scheme), "scale", tensor.scale, torch.float32, scheme.scale_shape(*layer.weight.shape))


def check_scale_is_usable(quantizer: Quantizer) -> None:
    """No scale is zero or not finite: weights are divided by it."""
    for layer, scheme, tensor in returned(quantizer, typical()):
        unusable = (~torch.isfinite(tensor.scale) | (tensor.scale == 0)).nonzero()
        if len(unusable):
            raise CheckFailure(
                f"{place(layer, scheme)}: {len(unusable)} scales are zero or not finite, first at {unusable[0].tolist()}"
            )


def check_scale_is_as_stored(quantizer: Quantizer) -> None:
    """Scales are rounded as they are stored (affine.round_scale), so that codes are right for what is read back."""
    for bits, model in ((24, ""), (8, " of a bfloat16 model")):
        for layer, scheme, tensor in returned(quantizer, typical(), scale_bits=bits):
            stored = affine.round_scale(tensor.scale, scheme)
            if not torch.equal(stored, tensor.scale):
                change = float(((stored - tensor.scale) / tensor.scale).abs().max())
                raise CheckFailure(f"{place(layer, scheme)}{model}: storing moves a scale by {change:.1e} of it")


def check_nested_scale_fits_scheme(quantizer: Quantizer) -> None:
    """nested_scale is there where the scheme has double quantization, and gives the scale that codes are multiplied by."""
    for layer, scheme, tensor in returned(quantizer, typical()):
        where, nested = place(layer, scheme), tensor.nested_scale
        if (nested is not None) != scheme.double_quant:
            raise CheckFailure(f"{where}: nested_scale is {'missing' if nested is None else 'there'}")
        if nested is not None and not torch.equal(nested.dequantize(), tensor.scale):
            raise CheckFailure(f"{where}: scale is not what nested_scale gives")


def check_zero_point_fits_scheme(quantizer: Quantizer) -> None:
    """zero_point is None for symmetric schemes, else int8 like scale and in the range of codes."""
    for layer, scheme, tensor in returned(quantizer, typical()):
        where = place(layer, scheme)
        if (tensor.zero_point is None) != scheme.symmetric:
            raise CheckFailure(f"{where}: zero_point is {'missing' if tensor.zero_point is None else 'there'}")
        if tensor.zero_point is not None:
            _require(where, "zero_point", tensor.zero_point, torch.int8, scheme.scale_shape(*layer.weight.shape))
            _require_range(where, "zero_point", tensor.zero_point, *scheme.code_range)


def check_outliers_are_declared(quantizer: Quantizer) -> None:
    """Only a quantizer with has_outliers returns outliers: columns [n] int64, sorted and unique, weight [out, n] finite."""
    for layer, scheme, tensor in returned(quantizer, typical()):
        if tensor.outliers is None:
            continue
        where, columns = place(layer, scheme), tensor.outliers.columns
        if not quantizer.has_outliers:
            raise CheckFailure(f"{where}: it returned {len(columns)} outlier columns without has_outliers")
        _require(where, "outliers.columns", columns, torch.int64, (len(columns),))
        _require_range(where, "outliers.columns", columns, 0, layer.weight.shape[1] - 1)
        if not bool((columns[1:] > columns[:-1]).all()):
            raise CheckFailure(f"{where}: outliers.columns are not sorted and unique: {columns.tolist()[:8]}")
        _require(where, "outliers.weight", tensor.outliers.weight, torch.float32, (len(layer.weight), len(columns)))
        if not bool(torch.isfinite(tensor.outliers.weight).all()):
            raise CheckFailure(f"{where}: outliers.weight is not finite")


def check_prepare_keeps_layers(quantizer: Quantizer) -> None:
    """`prepare` returns the same layers and weights, smoothing_scale perhaps set: qconvert itself puts the scale in."""
    for scheme in schemes_of(quantizer):
        group = typical().group(quantizer)
        prepared = quantizer.prepare(group, (scheme,) * len(group.layers))
        where = place(group.layers[0], scheme)
        if not isinstance(prepared, LinearGroup):
            raise CheckFailure(f"{where}: prepare returned a {type(prepared).__name__}")
        if len(prepared.layers) != len(group.layers):
            raise CheckFailure(f"{where}: prepare got {len(group.layers)} layers and returned {len(prepared.layers)}")
        for new, old in zip(prepared.layers, group.layers, strict=True):
            if new.name != old.name or new.weight is not old.weight:
                raise CheckFailure(f"{place(old, scheme)}: prepare returned another layer or weight")


def check_smoothing_scale_is_usable(quantizer: Quantizer) -> None:
    """smoothing_scale is float32 [in], finite and positive: inputs are divided by it."""
    for scheme in schemes_of(quantizer):
        group = typical().group(quantizer)
        scale = quantizer.prepare(group, (scheme,) * len(group.layers)).smoothing_scale
        if scale is not None:
            where = place(group.layers[0], scheme)
            _require(where, "smoothing_scale", scale, torch.float32, (group.layers[0].weight.shape[1],))
            unusable = (~torch.isfinite(scale) | (scale <= 0)).nonzero()
            if len(unusable):
                raise CheckFailure(f"{where}: {len(unusable)} smoothing scales are no positive numbers")


def _require(where: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise CheckFailure(f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}")


def _require_range(where: str, name: str, values: Tensor, low: int, high: int) -> None:
    if values.numel() and (int(values.min()) < low or int(values.max()) > high):
        raise CheckFailure(f"{where}: {name} holds {int(values.min())}..{int(values.max())}, outside {low}..{high}")
