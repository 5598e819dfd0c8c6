"""Distribution: what calibration saw of one value of a model, as a histogram whose bins are the same whoever counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from qconvert.ir import bins
from qconvert.ir.histogram import Histogram

BINS = 4096  # on either side of 0


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
    width: of a bin, the smallest power of two with which all numbers have a bin; for zeros alone bins.LEAST_WIDTH.
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
        width = bins.least_width(minimum, maximum, BINS)
        return cls(
            count=values.numel(),
            zeros=values.numel() - int(values.count_nonzero()),
            minimum=minimum,
            maximum=maximum,
            batch_minima=(minimum,),
            batch_maxima=(maximum,),
            counts=bins.counted(values.reshape(-1), width, BINS),
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
            counts=bins.widened(self.counts, width / self.width) + bins.widened(other.counts, width / other.width),
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

    def share_beyond(self, low: float, high: float) -> float:
        """Return the share of the numbers, 0 to 1, below `low` or above `high`.

        Those in a bin that either of the two lies in are not counted, so that it is 0 for the whole range.
        """
        edges = self.edges
        beyond = (edges[1:] <= low) | (edges[:-1] > high)
        return int(self.counts[beyond].sum()) / self.count

    @property
    def histogram(self) -> Histogram:
        """The counts in few bins."""
        return bins.histogram(self.counts, self.width)

    def clipped(self, low: float, high: float, *, symmetric: bool) -> ValueRange:
        """Return the range from `low` to `high`, cut to what was seen.

        symmetric: as far on both sides of 0 as it then reaches on either.
        """
        low, high = (min(max(end, self.minimum), self.maximum) for end in (low, high))
        if symmetric:
            high = max(-low, high)
            low = -high
        return ValueRange(low, high)
