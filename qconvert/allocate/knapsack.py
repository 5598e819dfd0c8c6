"""The multiple-choice knapsack, solved exactly: one option of every item, the least total loss within a budget.

Dynamic programming over the items keeps every state (bytes, loss) that no other beats in both (Nemhauser and Ullmann,
"Discrete Dynamic Programming and Capital Allocation", 1969). Most of them are dropped early: a Lagrange multiplier prices
bytes in loss, which gives a lower bound of all that a state can still become and a good solution to hold it against.
It is exact in integers, where a solver of linear programs has tolerances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

BISECTIONS = 100
# Sums of the same numbers in another order differ by this much of themselves at most.
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Option:
    """One way to take an item. cost: in bytes. loss: never negative."""

    cost: int
    loss: float


def solve(items: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """Return the index of the option that every item takes; None if even the cheapest cost more than `budget`.

    Of equal solutions always the same one.
    """
    costs = [np.array([option.cost for option in options], np.int64) for options in items]
    losses = [np.array([option.loss for option in options], np.float64) for options in items]
    if sum(int(cost.min()) for cost in costs) > budget:
        return None
    price, reachable = _price(costs, losses, budget)
    # What the items from each on take at least: bytes, and loss with bytes at their price.
    least_cost = _suffix_sums([float(cost.min()) for cost in costs])
    least_priced = _suffix_sums([float((loss + price * cost).min()) for cost, loss in zip(costs, losses, strict=True)])
    total_cost, total_loss = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[Integers, Integers]] = []  # per item: of every state the one that it came from, and the option
    for index, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        new_cost = (total_cost[:, None] + cost).ravel()
        new_loss = (total_loss[:, None] + loss).ravel()
        bound = new_loss + price * (new_cost - budget) + least_priced[index + 1]
        slack = ROUNDING * (reachable + price * budget)
        kept = np.flatnonzero((new_cost + least_cost[index + 1] <= budget) & (bound <= reachable + slack))
        kept = kept[_undominated(new_cost[kept], new_loss[kept])]
        steps.append((kept // len(cost), kept % len(cost)))
        total_cost, total_loss = new_cost[kept], new_loss[kept]
    state = int(total_loss.argmin())
    chosen = []
    for origins, options in reversed(steps):
        chosen.append(int(options[state]))
        state = int(origins[state])
    return chosen[::-1]


def _price(costs: Sequence[Integers], losses: Sequence[Floats], budget: int) -> tuple[float, float]:
    """The least price of a byte at which items that weigh loss and bytes keep the budget, and the loss they then have."""

    def at(price: float) -> tuple[int, float]:
        picks = [int((loss + price * cost).argmin()) for cost, loss in zip(costs, losses, strict=True)]
        return (
            sum(int(cost[pick]) for cost, pick in zip(costs, picks, strict=True)),
            sum(float(loss[pick]) for loss, pick in zip(losses, picks, strict=True)),
        )

    if at(0.0)[0] <= budget:
        return 0.0, at(0.0)[1]
    # From this price on nothing is worth a byte more than the least.
    low, high = 0.0, max(float(loss.max()) for loss in losses) + 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle)[0] <= budget else (middle, high)
    return high, at(high)[1]


def _suffix_sums(values: Sequence[float]) -> list[float]:
    """sums[i] = values[i] + values[i + 1] + ..., and a 0 at the end."""
    return [sum(values[start:]) for start in range(len(values) + 1)]


def _undominated(cost: Integers, loss: Floats) -> Integers:
    """Indices of the states than which none costs less, or as much, at no more loss; by cost."""
    order = np.lexsort((loss, cost))
    sorted_loss = loss[order]
    before = np.minimum.accumulate(np.concatenate(([np.inf], sorted_loss[:-1])))
    return order[sorted_loss < before]
