"""Budget: how much the quantized weights may take, and its text form ("4.5", "90MB")."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from qconvert.errors import UsageError

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}

_BUDGET = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>bits|B|kB|MB|GB)?\s*")


@dataclass(frozen=True, slots=True)
class Budget:
    """Average bits per quantized weight, scales included, or bytes of tensor data in all.

    text: as it was written.
    amount: exact, because 4.1 bits as a binary fraction would be a byte too few or too many.
    in_bytes: whether it counts bytes, of quantized and float tensors together.
    """

    text: str
    amount: Fraction
    in_bytes: bool

    @staticmethod
    def parse(text: str) -> Budget:
        """Parse '4.5' (average bits) or '90MB'. Raises UsageError QC-BUDGET-001 for a text that is no budget."""
        match = _BUDGET.fullmatch(text)
        if match is None or not Fraction(match["number"]):
            raise UsageError(
                "QC-BUDGET-001",
                f"'{text}' is not a budget",
                hint="write average bits per quantized weight, such as 4.5, or the size of all weights: 90MB (B, kB, MB, GB)",
            )
        unit = match["unit"] or "bits"
        return Budget(text.strip(), Fraction(match["number"]) * UNITS.get(unit, 1), unit != "bits")

    def __str__(self) -> str:
        return self.text

    def quantized_bytes(self, weights: int, other_bytes: int) -> int:
        """Return the most that `weights` quantized weights may take beside `other_bytes` of float tensors."""
        return int(self.amount - other_bytes if self.in_bytes else self.amount * weights / 8 // 1)
