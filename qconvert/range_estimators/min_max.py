"""Min-max: all that was seen.

    range = [min x, max x]

Nothing is clipped, and one outlier makes the steps of all values wide.

Source: M. Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.ir.distribution import Distribution, ValueRange
from qconvert.plugin import hookimpl
from qconvert.plugin.range_estimator import RangeEstimator


@hookimpl
def register_range_estimators() -> list[type[RangeEstimator]]:
    """Register the estimator of this module."""
    return [MinMax]


@dataclass(frozen=True)
class MinMax(RangeEstimator):
    """From the smallest to the largest value that was seen."""

    name = "min-max"

    def choose(self, seen: Distribution, codes: int, *, symmetric: bool) -> ValueRange:
        """Return the range of all values; symmetric: of the largest magnitude."""
        return seen.clipped(seen.minimum, seen.maximum, symmetric=symmetric)
