"""All quantization arithmetic: weight [out, in] ~ (q - zero_point) * scale, or values[q] * scale where codes are places in a
codebook (ir/nearest_value.py).

Scales and zero points are always [out, groups] (per tensor [1, 1]): one code path for every granularity.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qconvert.ir import affine, nearest_value
from qconvert.ir.scheme import PerTensor, QuantScheme

FLOAT16_TINY = 2.0**-14  # smallest normal float16: a smaller scale would lose bits to subnormals
FLOAT16_MAX = 65504.0


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices over the rows of a [rows, columns] matrix, whose float32 copies stay in the processor's cache.

    Elementwise work on whole weights is bound by memory and by the paging in of temporaries: in slices of 512 kB it
    takes a third of the time (measured, 1536 x 576).
    """
    step = rows_at_once(columns)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def rows_at_once(columns: int) -> int:
    """Return the number of rows in a slice of `row_blocks`."""
    return max(1, 131_072 // columns)


def grouped(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """View weight [out, in] as [rows, groups, group_size]: what shares a scale lies along the last axis."""
    out_features, in_features = weight.shape
    if isinstance(scheme.granularity, PerTensor):
        return weight.reshape(1, 1, -1)
    size = scheme.group_size(in_features)
    return weight.reshape(out_features, in_features // size, size)  # of no rows too, which -1 would not be told for


def choose_qparams(weight: Tensor, scheme: QuantScheme, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Choose the scale and zero point that cover the range of `weight`, shrunk by `clip`.

    weight: [out, in] float32, finite.
    clip: a ratio above 0 (one above 1 widens the range), or one per group [out, groups].

    Returns (scale [out, groups] float32, zero_point [out, groups] int8 or None). Symmetric int4 follows the
    signed maximum, `scale = w[argmax |w|] / -8`, so the scale may be negative and a constant group is exact.
    An all-zero group gets scale 1 and survives as zeros; with a codebook it keeps a scale of 0, as in bitsandbytes.
    """
    return qparams_of(extremes(weight, scheme), scheme, clip)


def extremes(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, ...]:
    """Return what `choose_qparams` looks at, each [out, groups]: the signed maximum or the maximum magnitude of every group, or
    the smallest and the largest weight.
    """
    groups = grouped(weight, scheme)
    if scheme.symmetric:
        if scheme.format.signed_maximum:
            return (_signed_maximum(groups),)
        return (groups.abs().amax(-1),)
    # Zero is always representable: padding, ReLU zeros and masked inputs must map back to exactly 0.
    return groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)


def _signed_maximum(groups: Tensor) -> Tensor:
    """Return w[argmax |w|] of groups [..., n]: [...]; of two that differ in sign alone the first.

    argmax takes thrice the time.
    """
    smallest, largest = groups.amin(-1), groups.amax(-1)
    signed = torch.where(largest > -smallest, largest, smallest)
    tied = (largest == -smallest) & (largest > 0)
    if tied.any():
        rows = groups[tied]
        signed[tied] = rows.gather(-1, rows.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return signed


def qparams_of(found: tuple[Tensor, ...], scheme: QuantScheme, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Compute what `choose_qparams` gives from the `extremes` of a weight."""
    if scheme.codebook is not None:
        return found[0] * clip, None
    low, high = scheme.code_range
    if scheme.symmetric:
        scale = found[0] / (low if scheme.format.signed_maximum else high)
        return round_scale(scale * clip, scheme), None
    smallest, largest = (extreme * clip for extreme in found)
    # In float64: the range of finite weights may overflow float32.
    scale = round_scale(((largest.double() - smallest) / (high - low)).float(), scheme)
    zero_point = (low - torch.round(smallest / scale)).clamp(low, high)
    return scale, zero_point.to(torch.int8)


def round_scale(scale: Tensor, scheme: QuantScheme) -> Tensor:
    """Round `scale` to the value that will be stored; codes are computed with it, so they are right for what is stored.

    No scale has more than `scheme.scale_bits` significant bits: what a loader casts to the dtype of a bfloat16 model (8) then
    is what the graph computes with, and the range moves by at most 0.4 %.
    float16 schemes: rounded to float16, unless that under- or overflows. int4: rounded to 8 significant bits, asymmetric to
    7, so that (q - zero_point) * scale, 3 bits and a sign by 8 or 4 bits by 7, is exact even in float16 arithmetic; the range
    then moves by at most 0.4 or 0.8 %.
    Zero scales, and those that even float32 cannot divide by, become 1: their groups hold nothing but zeros to that
    precision. The scales of codebooks are stored as they are.
    """
    if scheme.codebook is not None:
        return scale
    scale = torch.where(scale.abs() < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    bits = scheme.scale_bits
    if scheme.scale_dtype == torch.float16 and fits_float16(scale):
        bits = min(bits, scheme.format.scale_bits if scheme.symmetric else scheme.format.asymmetric_scale_bits)
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.round(mantissa * 2**bits) / 2**bits, exponent)


def fits_float16(scale: Tensor) -> bool:
    """Return whether every scale is a normal float16 number."""
    magnitude = scale.abs()
    return bool(((magnitude >= FLOAT16_TINY) & (magnitude <= FLOAT16_MAX)).all())


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """Return the codes of `weight` [out, in] as int8, rounded to nearest and clamped to the scheme's range."""
    groups = grouped(weight, scheme)
    if scheme.codebook is not None:
        return nearest_value.codes_of(groups, scale, scheme.codebook).reshape(weight.shape)
    codes = torch.round(groups / scale.unsqueeze(-1))
    if zero_point is not None:
        codes += zero_point.unsqueeze(-1)
    low, high = scheme.code_range
    return codes.clamp_(low, high).to(torch.int8).reshape(weight.shape)


def rounded(weight: Tensor, scheme: QuantScheme, qparams: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
    """Return what `dequantize` gives for `quantize`, without codes in between: half the time, for searches.

    qparams: scale and zero point; unset, `choose_qparams`.
    """
    scale, zero_point = choose_qparams(weight, scheme) if qparams is None else qparams
    if scheme.codebook is not None:
        return dequantize(quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme)
    groups, step = grouped(weight, scheme), scale.unsqueeze(-1)
    codes = torch.div(groups, step).round_()
    low, high = scheme.code_range
    if zero_point is None:
        codes.clamp_(low, high)
    else:
        zero = zero_point.unsqueeze(-1).float()
        codes.add_(zero).clamp_(low, high).sub_(zero)
    return codes.mul_(step).reshape(weight.shape)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """Return float32 [out, in] from codes [out, in]."""
    groups = grouped(q, scheme)
    groups = groups.float() if scheme.codebook is None else nearest_value.values_of(groups, scheme.codebook)
    if zero_point is not None:
        groups = groups - zero_point.unsqueeze(-1)
    return (groups * scale.unsqueeze(-1)).reshape(q.shape)


def stored_scale(scale: Tensor, scheme: QuantScheme) -> Tensor:
    """Return the scale in the dtype that it is stored in, without loss: it was rounded by affine.round_scale."""
    return scale.half() if scheme.scale_dtype == torch.float16 and affine.fits_float16(scale) else scale
