"""Distribution: what calibration saw of one value of a model, as a histogram whose bins are the same whoever counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

BINS = 4096  # on either side of 0

# The smallest positive float32: every float32 is a multiple of it, so that no bin has to be narrower.
LEAST_EXPONENT = -149

# So few values stay in the cache, and torch does not divide them among threads, which wait for each other where others compute:
# 20 million values took 0.08 s in this way and 0.5 to 4 s with threads, on two cores that were not idle.
COUNTED_AT_ONCE = 1 << 15


@dataclass(frozen=True, slots=True)
class ValueRange:
    """The range from `low` to `high` that codes are to stand for; values beyond are clipped to its ends."""

    low: float
    high: float


@dataclass(frozen=True, eq=False, slots=True)
class Distribution:
    """The distribution of the numbers, all finite, that one value of a model had in calibration.

    count, zeros: how many numbers there were, and how many of them were 0, which every range with 0 in it has a code for.
    minimum, maximum: of all numbers.
    batch_minima, batch_maxima: of each batch, in the order of the batches.
    counts: int64 [2 * BINS], how many numbers lie in [k * width, (k + 1) * width) for k from -BINS to BINS - 1.
    width: of a bin, the smallest power of two with which all numbers have a bin; for zeros alone 2 ** LEAST_EXPONENT.
    """

    count: int
    zeros: int
    minimum: float
    maximum: float
    batch_minima: tuple[float, ...]
    batch_maxima: tuple[float, ...]
    counts: Tensor
    width: float

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Count one batch: `values` of any shape and float type, at least one, all finite."""
        minimum, maximum = (float(end) for end in values.aminmax())
        width = math.ldexp(1.0, max(LEAST_EXPONENT, _exponent(minimum, maximum)))
        return cls(
            count=values.numel(),
            zeros=values.numel() - int(values.count_nonzero()),
            minimum=minimum,
            maximum=maximum,
            batch_minima=(minimum,),
            batch_maxima=(maximum,),
            counts=_counts(values.reshape(-1), width),
            width=width,
        )

    def merged(self, other: Self) -> Self:
        """Return what one would have counted that saw the batches of this one, and then those of `other`.

        It is exact: widths are powers of two and bins begin at 0, so that a wider bin holds whole narrower ones.
        """
        width = max(self.width, other.width)
        return type(self)(
            count=self.count + other.count,
            zeros=self.zeros + other.zeros,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            batch_minima=self.batch_minima + other.batch_minima,
            batch_maxima=self.batch_maxima + other.batch_maxima,
            counts=_widened(self.counts, width / self.width) + _widened(other.counts, width / other.width),
            width=width,
        )

    @property
    def edges(self) -> Tensor:
        """Where bins begin and end: float64 [2 * BINS + 1]."""
        return torch.arange(-BINS, BINS + 1, dtype=torch.float64) * self.width

    @property
    def centers(self) -> Tensor:
        """The middle of each bin: float64 [2 * BINS]."""
        return (torch.arange(-BINS, BINS, dtype=torch.float64) + 0.5) * self.width

    @property
    def magnitudes(self) -> Tensor:
        """How many numbers have a magnitude between k * width and (k + 1) * width: int64 [BINS], k from 0."""
        return self.counts[BINS:] + self.counts[:BINS].flip(0)

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(-self.minimum, self.maximum)

    def clipped(self, low: float, high: float, *, symmetric: bool) -> ValueRange:
        """Return the range from `low` to `high`, cut to what was seen.

        symmetric: as far on both sides of 0 as it then reaches on either.
        """
        low, high = (min(max(end, self.minimum), self.maximum) for end in (low, high))
        if symmetric:
            high = max(-low, high)
            low = -high
        return ValueRange(low, high)


def _exponent(minimum: float, maximum: float) -> int:
    """The exponent of the smallest power of two with which `maximum` < BINS * width and `minimum` >= -BINS * width."""
    bits = BINS.bit_length() - 1
    needed = [LEAST_EXPONENT]
    if maximum > 0:  # 2 ** (exponent - 1) <= maximum < 2 ** exponent
        needed.append(math.frexp(maximum)[1] - bits)
    if minimum < 0:  # a power of two is the lower end of the lowest bin
        mantissa, exponent = math.frexp(-minimum)
        needed.append(exponent - (mantissa == 0.5) - bits)
    return max(needed)


def _counts(values: Tensor, width: float) -> Tensor:
    """Count `values` [n] in the bins of `width`: int64 [2 * BINS], on the CPU."""
    # A product with a power of two is exact where it neither overflows nor becomes 0, which double precision never does here.
    exact = values.dtype.itemsize <= 4 and 2.0**-126 <= width <= 1
    dtype = torch.float32 if exact else torch.float64
    counts = torch.zeros(2 * BINS, dtype=torch.int64, device=values.device)
    for part in values.split(COUNTED_AT_ONCE):
        scaled = part.to(dtype) * (1 / width)
        bins = scaled.to(torch.int32)  # towards 0; floor(), which would do, is always divided among threads
        bins -= (scaled < bins).to(torch.int32)
        counts += torch.bincount(bins.add_(BINS), minlength=2 * BINS)
    return counts.cpu()


def _widened(counts: Tensor, factor: float) -> Tensor:
    """Return `counts` in bins that are `factor`, a power of two, times as wide."""
    joined = min(int(factor), BINS)  # from there on all of a side is in its bin beside 0
    held = counts.reshape(-1, joined).sum(1)
    empty = counts.new_zeros((len(counts) - len(held)) // 2)
    return torch.cat([empty, held, empty])
