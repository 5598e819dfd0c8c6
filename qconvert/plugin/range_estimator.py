"""The RangeEstimator contract: one algorithm that chooses the range of a value's codes from what calibration saw of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from qconvert.ir.distribution import Distribution, ValueRange


class RangeEstimator(ABC):
    """Chooses the range of an activation that is quantized with a scale from calibration.

    Subclasses are frozen dataclasses: their fields are the user's options, with types, defaults and docs.
    An estimator changes nothing of what it is given, and the same distribution gives the same range.

    name: what the user types, kebab-case.
    """

    name: ClassVar[str]

    @abstractmethod
    def choose(self, seen: Distribution, codes: int, *, symmetric: bool) -> ValueRange:
        """Choose the range that codes stand for; what lies beyond it is clipped.

        seen: of one value, over all batches.
        codes: how many codes there are: 256 for 8 bits, 65536 for 16.
        symmetric: whether the range has to have 0 in its middle, `low == -high`.

        Returns a range with `low <= high` that reaches no further than what was seen, or 0 where nothing of that sign was seen
        (`seen.clipped` cuts one to that). qconvert widens it where it does not contain 0, for which there is always a code.
        """
