"""Moving average: the extremes of batches, averaged over the batches in their order.

    x_min = min X                              for the first batch X
    x_min = x_min + c (min X - x_min)          for each one after it, and x_max alike

A single batch with outliers widens the range by a share c of them only. The first batch counts most: 0.99^n of it is left after
n others.

Source: torch.ao.quantization.observer.MovingAverageMinMaxObserver of PyTorch, for constant and formula; B. Jacob et al.,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qconvert.ir.distribution import Distribution, ValueRange
from qconvert.plugin import hookimpl
from qconvert.plugin.range_estimator import RangeEstimator


@hookimpl
def register_range_estimators() -> list[type[RangeEstimator]]:
    """Register the estimator of this module."""
    return [MovingAverage]


@dataclass(frozen=True)
class MovingAverage(RangeEstimator):
    """The averages of the smallest and the largest values of batches.

    averaging_constant: how far each batch moves the average towards its own extreme; 1 takes those of the last batch.
    """

    averaging_constant: float = 0.01

    name = "moving-average"

    def __post_init__(self) -> None:
        if not 0 < self.averaging_constant <= 1:
            raise ValueError("averaging_constant must be above 0 and at most 1")

    def choose(self, seen: Distribution, codes: int, *, symmetric: bool) -> ValueRange:
        """Return the range between the averages; symmetric: of the larger magnitude."""
        low, high = self._averaged(seen.batch_minima), self._averaged(seen.batch_maxima)
        return seen.clipped(low, high, symmetric=symmetric)

    def _averaged(self, extremes: Sequence[float]) -> float:
        average, *others = extremes
        for each in others:
            average += self.averaging_constant * (each - average)
        return average
