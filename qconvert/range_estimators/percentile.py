"""Percentile: what remains when the outermost values are cut off.

    range = [Q((100 - p) / 2), Q(100 - (100 - p) / 2)]          asymmetric: half of what is cut off lies on either side
    range = [-T, T],  T = Q of |x| at p                         symmetric

Q is the quantile in percent, read off the histogram; between the edges of a bin its values are taken as evenly spread.

Source: H. Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation", 2020, section
3.3. The default is that of NVIDIA's pytorch-quantization, the division between two sides that of PercentileCalibrater in ONNX
Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from qconvert.ir.distribution import Distribution, ValueRange
from qconvert.plugin import hookimpl
from qconvert.plugin.range_estimator import RangeEstimator


@hookimpl
def register_range_estimators() -> list[type[RangeEstimator]]:
    """Register the estimator of this module."""
    return [Percentile]


@dataclass(frozen=True)
class Percentile(RangeEstimator):
    """The range of nearly all values, without the outermost ones.

    percentile: how many of the values it holds, in percent.
    """

    percentile: float = 99.99

    name = "percentile"

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise ValueError("percentile must be above 0 and at most 100")

    def choose(self, seen: Distribution, codes: int, *, symmetric: bool) -> ValueRange:
        """Return the range between two quantiles; symmetric: that of the magnitude's."""
        if symmetric:
            high = _quantile(seen.magnitudes, seen.edges[len(seen.magnitudes) :], self.percentile / 100)
            return seen.clipped(-high, high, symmetric=True)
        cut = (100 - self.percentile) / 200
        low, high = (_quantile(seen.counts, seen.edges, share) for share in (cut, 1 - cut))
        return seen.clipped(low, high, symmetric=False)


def _quantile(counts: Tensor, edges: Tensor, share: float) -> float:
    """Return the smallest value up to which a `share` of the numbers lies. counts: [bins], edges: [bins + 1]."""
    wanted = round(share * int(counts.sum()), 6)  # 0.9999 of 40,000 numbers are 39,996, and not a trifle more
    sums = np.cumsum(counts.numpy())
    place = max(int(np.searchsorted(sums, wanted)), int(counts.nonzero()[0]))
    held = int(counts[place])
    inside = (wanted - (int(sums[place]) - held)) / held
    return float(edges[place] + inside * (edges[place + 1] - edges[place]))
