"""Floats rounded to a type of half the width, and what that loses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# Values that are compared at once, in float64.
AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Loss:
    """What was lost of one tensor.

    relative_error: ||x - rounded|| / ||x||.
    beyond: the finite value of the largest magnitude that became infinite, None where none did.
    zeroed: how many values that are not 0 became 0.
    largest_zeroed: the largest magnitude among those, None where there are none.
    """

    relative_error: float
    beyond: float | None
    zeroed: int
    largest_zeroed: float | None


def loss_of(tensor: Tensor, rounded: Tensor) -> Loss:
    """Measure what `rounded`, the same in a narrower float type, has lost of `tensor`, of any shape."""
    squares = lost = beyond = largest_zeroed = 0.0
    zeroed = 0
    for before, after in zip(tensor.flatten().split(AT_ONCE), rounded.flatten().split(AT_ONCE), strict=True):
        wanted, found = before.double(), after.double()
        too_large = wanted[found.isinf() & wanted.isfinite()]
        if too_large.numel():
            beyond = max(beyond, float(too_large[too_large.abs().argmax()]), key=abs)
        gone = wanted[(found == 0) & (wanted != 0)].abs()
        zeroed += gone.numel()
        largest_zeroed = max(largest_zeroed, float(gone.max()) if gone.numel() else 0.0)
        finite = found.isfinite() & wanted.isfinite()  # masks hold infinity on purpose
        squares += float(wanted[finite].square().sum())
        lost += float((wanted[finite] - found[finite]).square().sum())
    return Loss(math.sqrt(lost / squares) if squares else 0.0, beyond or None, zeroed, largest_zeroed or None)
