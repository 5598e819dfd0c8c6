"""MSE: the range with the least expected squared error of quantizing and dequantizing.

    least over [l, h]:  E (x - x^)^2,   x^ = s r,   r = clamp(round(x / s), a, b)

s = (h - l) / (codes - 1), a = -round(-l / s), b = a + codes - 1; for symmetric codes s = h / b, b = codes / 2 - 1, a = -b.

The expectation is over the histogram, each bin evenly filled, and exact for such: with t = x / s, the integral of (t - r)^2 is
r / 12 + (t - r)^3 / 3, also across points where r changes. So a bin may be wider than a step, as it is beside an outlier. Zeros
have no error, and do not count.

While steps are fine against the distribution, the rounding error is s^2 / 12, and its sum with the clipping error is convex in
l and h: searching one end after the other, in steps that become finer, finds the least.

Source: M. Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qconvert.ir.distribution import BINS, Distribution, ValueRange
from qconvert.plugin import hookimpl
from qconvert.plugin.range_estimator import RangeEstimator

Floats = npt.NDArray[np.float64]

# By what the best ends so far are multiplied, and how often at each end: down to one bin, then between what was tried before.
SEARCH = (
    (np.exp2(-np.arange(13.0)), 3),
    (np.exp2(np.arange(-5, 6) / 5), 4),
    (np.exp2(np.arange(-4, 5) / 20), 3),
)


@hookimpl
def register_range_estimators() -> list[type[RangeEstimator]]:
    """Register the estimator of this module."""
    return [MSE]


@dataclass(frozen=True)
class MSE(RangeEstimator):
    """The range with the least squared error of what is rounded within it and clipped beyond it."""

    name = "mse"

    def choose(self, seen: Distribution, codes: int, *, symmetric: bool) -> ValueRange:
        """Return the best range for so many codes; symmetric: the best for codes on both sides of 0."""
        if symmetric:
            (high,) = _least(_Histogram(seen), np.array([seen.largest]), codes)
            return seen.clipped(-high, high, symmetric=True)
        low, high = _least(_Histogram(seen), np.array([min(seen.minimum, 0), max(seen.maximum, 0)]), codes)
        return seen.clipped(low, high, symmetric=False)


class _Histogram:
    """What was seen, in bins that hold something or lie between such.

    edges: [bins + 1]. The outermost are the smallest and the largest number, so that a constant has one bin without a width.
    counts: [bins], without zeros.
    """

    def __init__(self, seen: Distribution) -> None:
        counts = seen.counts.numpy().astype(np.float64)
        counts[BINS] -= seen.zeros
        held = seen.counts.nonzero().flatten()
        first, last = int(held[0]), int(held[-1]) + 1
        self.counts = counts[first:last]
        self.edges = seen.edges[first : last + 1].numpy()
        self.edges[0], self.edges[-1] = seen.minimum, seen.maximum

    def errors(self, step: Floats, lowest: Floats, highest: Floats) -> Floats:
        """Return the sum of squared errors for each of n grids from lowest * step to highest * step: all [n]."""
        t = self.edges / step[:, None]
        rest = t - np.clip(np.rint(t), lowest[:, None], highest[:, None])
        integral = (t - rest) / 12 + rest**3 / 3
        width = np.diff(t)
        # The largest number may lie on an edge, and be the only one of its bin.
        mean = np.where(width > 0, np.diff(integral) / np.where(width > 0, width, 1), rest[:, 1:] ** 2)
        errors: Floats = (mean @ self.counts) * step**2
        return errors


def _least(histogram: _Histogram, ends: Floats, codes: int) -> list[float]:
    """Return what of `ends`, [low, high] or the end of a symmetric range, is left where the error is least."""
    shares = np.ones(len(ends))
    for factors, rounds in SEARCH:
        for each in np.flatnonzero(ends).tolist() * rounds:
            tried = np.tile(shares, (len(factors), 1))
            tried[:, each] = np.minimum(shares[each] * factors, 1)
            shares = tried[histogram.errors(*_grids(tried * ends, codes)).argmin()]
    return [float(end) for end in shares * ends]


def _grids(ranges: Floats, codes: int) -> tuple[Floats, Floats, Floats]:
    """Return step, lowest and highest code of n ranges [n, 1] or [n, 2], codes counted from that of 0."""
    if ranges.shape[1] == 1:
        highest = np.full(len(ranges), codes / 2 - 1)
        return ranges[:, 0] / highest, -highest, highest
    low, high = ranges.T
    step = (high - low) / (codes - 1)
    lowest = -np.rint(-low / step)
    return step, lowest, lowest + codes - 1
