"""Timing: how long the repeats of one thing took, and how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Self

import numpy as np


@dataclass(frozen=True, slots=True)
class Timing:
    """The seconds that repeats of one thing took on the clock: how many there were, their quartiles and 95th percentile.

    worked: mean of the seconds that the cores worked for one.
    """

    repeats: int
    p25: float
    p50: float
    p75: float
    p95: float
    worked: float

    @classmethod
    def of(cls, passed: Sequence[float], worked: Sequence[float]) -> Self:
        """Return the timing of repeats, of which there is at least one, from the seconds that each took on both clocks."""
        p25, p50, p75, p95 = (float(each) for each in np.percentile(passed, (25, 50, 75, 95)))
        return cls(len(passed), p25, p50, p75, p95, fmean(worked))

    def __add__(self, other: Timing) -> Timing:
        """Return the timing of both, one after the other. Its quartiles are as far apart as if both varied together."""
        return Timing(
            min(self.repeats, other.repeats),
            self.p25 + other.p25,
            self.p50 + other.p50,
            self.p75 + other.p75,
            self.p95 + other.p95,
            self.worked + other.worked,
        )
