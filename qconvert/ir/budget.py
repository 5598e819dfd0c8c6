"""Budgets: how much the quantized weights may take ("4.5", "90MB"), or how much the output may lose ("cosine>=0.999")."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from qconvert.errors import UsageError

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}

_BUDGET = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>bits|B|kB|MB|GB)?\s*")
_LOSS = re.compile(r"\s*(?P<sense>kl\s*<=|cosine\s*>=)\s*(?P<limit>\d+(\.\d+)?(e-?\d+)?)\s*")


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
            raise _no_budget(text)
        unit = match["unit"] or "bits"
        return Budget(text.strip(), Fraction(match["number"]) * UNITS.get(unit, 1), unit != "bits")

    def __str__(self) -> str:
        return self.text

    def quantized_bytes(self, weights: int, other_bytes: int) -> int:
        """Return the most that `weights` quantized weights may take beside `other_bytes` of float tensors."""
        return int(self.amount - other_bytes if self.in_bytes else self.amount * weights / 8 // 1)


@dataclass(frozen=True, slots=True)
class LossBudget:
    """What the output may lose against the float model.

    text: as it was written, which is how a gate on the same metric is written.
    metric: "kl" in nats, of models that write text; "cosine", of all others.
    limit: the largest KL or the smallest cosine.
    """

    text: str
    metric: Literal["kl", "cosine"]
    limit: float

    def __str__(self) -> str:
        return self.text

    @property
    def allowed(self) -> float:
        """The most that may be lost: KL, or 1 - cosine."""
        return self.limit if self.metric == "kl" else 1 - self.limit

    def words(self, loss: float) -> str:
        """Word what is lost as the metric has it: "cosine 0.99912"."""
        if self.metric == "kl":
            return f"KL {loss:.3g} nats"
        decimals = 5 if loss >= 1e-4 else min(9, 2 - math.floor(math.log10(loss))) if loss > 0 else 9
        return f"cosine {1 - loss:.{decimals}f}"


def parse_budget(text: str) -> Budget | LossBudget:
    """Parse the text of either kind. Raises UsageError QC-BUDGET-001 for a text that is no budget."""
    match = _LOSS.fullmatch(text)
    if match is None:
        return Budget.parse(text)
    is_kl, limit = match["sense"].startswith("kl"), float(match["limit"])
    if not limit or not (is_kl or limit < 1):
        raise _no_budget(text)
    return LossBudget(text.strip(), "kl" if is_kl else "cosine", limit)


def _no_budget(text: str) -> UsageError:
    return UsageError(
        "QC-BUDGET-001",
        f"'{text}' is not a budget",
        hint="write average bits per quantized weight, such as 4.5, or the size of all weights: 90MB (B, kB, MB, GB); beside "
        "static activations what may be lost: cosine>=0.999 (below 1), of models that write text kl<=0.05",
    )
