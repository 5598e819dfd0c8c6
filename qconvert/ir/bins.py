"""Bins to count numbers in: the width is a power of two and an edge is 0, so that a wider bin holds whole narrower ones.

Counts are int64 [..., 2 * n]: of bin k from -n to n - 1, how many numbers lie in [k * width, (k + 1) * width).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qconvert.ir.histogram import MOST_BINS, Histogram

# The smallest positive float32: every float32 is a multiple of it, so that no bin has to be narrower.
LEAST_EXPONENT = -149
LEAST_WIDTH = math.ldexp(1.0, LEAST_EXPONENT)

# So few values stay in the cache, and torch does not divide them among threads, which wait for each other where others compute:
# 20 million values took 0.08 s in this way and 0.5 to 4 s with threads, on two cores that were not idle.
COUNTED_AT_ONCE = 1 << 15


def least_width(minimum: float, maximum: float, bins: int) -> float:
    """Return the smallest width with which all from `minimum` to `maximum` have a bin, of `bins`, a power of two, on either
    side of 0; LEAST_WIDTH for zeros alone.
    """
    bits = bins.bit_length() - 1
    needed = [LEAST_EXPONENT]
    if maximum > 0:  # 2 ** (exponent - 1) <= maximum < 2 ** exponent
        needed.append(math.frexp(maximum)[1] - bits)
    if minimum < 0:  # a power of two is the lower end of the lowest bin
        mantissa, exponent = math.frexp(-minimum)
        needed.append(exponent - (mantissa == 0.5) - bits)
    return math.ldexp(1.0, max(needed))


def counted(values: Tensor, width: float, bins: int) -> Tensor:
    """Count `values` [n], which all have a bin of that width, of `bins` on either side of 0: int64 [2 * bins], on the CPU."""
    # A product with a power of two is exact where it neither overflows nor becomes 0, which double precision never does here.
    exact = values.dtype.itemsize <= 4 and 2.0**-126 <= width <= 1
    dtype = torch.float32 if exact else torch.float64
    counts = torch.zeros(2 * bins, dtype=torch.int64, device=values.device)
    for part in values.split(COUNTED_AT_ONCE):
        scaled = part.to(dtype) * (1 / width)
        numbers = scaled.to(torch.int32)  # towards 0; floor(), which would do, is always divided among threads
        numbers -= (scaled < numbers).to(torch.int32)
        counts += torch.bincount(numbers.add_(bins), minlength=2 * bins)
    return counts.cpu()


def widened(counts: Tensor, factor: float) -> Tensor:
    """Return `counts` in as many bins that are `factor`, a power of two, times as wide."""
    *others, bins = counts.shape
    joined = min(int(factor), bins // 2)  # from there on all of a side is in its bin beside 0
    held = counts.reshape(*others, -1, joined).sum(-1)
    beyond = (bins - held.shape[-1]) // 2
    found = counts.new_zeros(counts.shape)
    found[..., beyond : bins - beyond] = held
    return found


def to_draw(counts: Tensor, width: float) -> tuple[Tensor, float, float]:
    """Return `counts` in at most MOST_BINS bins, the width of those, and where the first of them begins.

    Bins are made wider until that few hold all numbers; of several rows of counts, they are the same for all.
    """
    while True:
        half = counts.shape[-1] // 2
        used = counts.reshape(-1, 2 * half).sum(0).nonzero()
        first, last = (int(used.min()), int(used.max())) if len(used) else (half, half)
        if last - first < MOST_BINS:
            return counts[..., first : last + 1], width, (first - half) * width
        counts, width = widened(counts, 2), 2 * width


def histogram(counts: Tensor, width: float) -> Histogram:
    """Return the histogram of one row of counts."""
    found, wide, low = to_draw(counts, width)
    return Histogram(low, wide, tuple(found.tolist()))
