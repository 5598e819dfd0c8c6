"""The codes of int8 activations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowCodes(NamedTuple):
    """The codes 0 to 255 of int8 activations: code = round(x / step) + zero_point, with a step for each row.

    steps: that the largest of a row is divided into; the largest magnitude where rows have both signs.
    least_step: no step is smaller, so that the lowest value has a code.
    """

    zero_point: int
    steps: float
    least_step: float = 0.0

    @property
    def symmetric(self) -> bool:
        """Whether the codes lie around 0, with no zero point to take off."""
        return self.zero_point == SYMMETRIC_ROWS.zero_point

    def step_of(self, rows: Tensor) -> Tensor:
        """Return the scale of each row of `rows` [..., in]: [..., 1]."""
        largest = (rows.abs() if self.symmetric else rows).amax(-1, keepdim=True)
        return (largest * torch.tensor(1 / self.steps, dtype=torch.float32)).clamp(min=self.least_step)


# The largest magnitude by 127.49 steps rounds to 127 as with 127 steps, and loses no more than any other value, half a step;
# but the steps are finer (KL of SmolLM2 0.0490 instead of 0.0502).
SYMMETRIC_ROWS = RowCodes(128, 127.49)

GELU_LOWEST = 0.1701  # below 0, the tanh approximation included

GELU_ZERO = 24  # of 16 to 64 the best for MiniLM by a hair; below, more rows are held to the least step

# What activation functions give is 0 or more, or hardly less: most of the codes go to what is above 0.
ROWS_AFTER = {
    "Relu": RowCodes(0, 255.49),
    "Gelu": RowCodes(GELU_ZERO, 255.49 - GELU_ZERO, GELU_LOWEST / (GELU_ZERO + 0.49)),
}


def row_codes(made_by: str | None) -> RowCodes:
    """Return how the rows that a linear reads are quantized.

    made_by: the type of the node that gives them; None where it is not known, or scaled.
    """
    return ROWS_AFTER.get(made_by or "", SYMMETRIC_ROWS)
