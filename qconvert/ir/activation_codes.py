"""ActivationCodes: how the values of a static range are written as codes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qconvert.ir.scheme import Activations

SMALLEST_NORMAL = 2.0**-126  # of float32


@dataclass(frozen=True, slots=True)
class ActivationCodes:
    """The codes of one value: code = round(x / scale) + zero_point, unsigned and saturating.

    scale: above 0, exact in float32.
    bits: 8 or 16.
    """

    scale: float
    zero_point: int
    bits: int

    @staticmethod
    def of(low: float, high: float, how: Activations) -> ActivationCodes:
        """Return the codes that spread over a range, `low` <= 0 <= `high`, so that 0 has a code and is exact.

        Symmetric codes lie around 0, unless no value is negative: half of them would be for nothing, and so they begin there.
        """
        if how.symmetric and low < 0:
            zero_point = how.codes // 2
            scale = _float32(max(-low, high) / (zero_point - 1))
        else:
            scale = _float32((high - low) / (how.codes - 1))
            zero_point = round(-low / scale)
        return ActivationCodes(scale, min(zero_point, how.codes - 1), how.bits)

    @property
    def low(self) -> float:
        """The smallest value that has a code."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """The largest value that has a code."""
        return float(2**self.bits - 1 - self.zero_point) * self.scale


# Part (see targets.graph_files) -> value of its graph -> its codes.
GraphCodes = Mapping[str, Mapping[str, ActivationCodes]]
NO_CODES: GraphCodes = MappingProxyType({})


def _float32(scale: float) -> float:
    """The nearest float32; 1 where that can't be divided by: there is nothing but zeros then, to that precision."""
    (rounded,) = struct.unpack("f", struct.pack("f", scale))
    return rounded if rounded >= SMALLEST_NORMAL else 1.0
