"""Repeats of a timing: until they are steady, within the seconds that there are for it.

The median of n repeats is known to about 1.57 * (p75 - p25) / sqrt(n), the notch of a box plot (McGill, Tukey and Larsen,
1978). They are steady where that is at most 2 % of the median, after at least 5 of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Self

from qconvert.ir.timing import Timing

# Repeats that are needed before they can be steady, and those after which they are as steady as they become.
FEWEST, MOST = 5, 100
NOTCH, STEADY = 1.57, 0.02
# Repeats of one call before it is the turn of the next, and the pause in between.
BLOCK, PAUSE_SECONDS = 3, 0.05

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Budget:
    """The seconds for several timings. end: when they are over, by time.perf_counter."""

    end: float

    @classmethod
    def of(cls, seconds: float) -> Self:
        """Return a budget that begins now."""
        return cls(time.perf_counter() + seconds)

    @property
    def is_over(self) -> bool:
        """Whether no time is left."""
        return time.perf_counter() >= self.end

    def part(self, share: float) -> Budget:
        """Return a budget that begins now and has a share of the time that is left, 0 to 1."""
        now = time.perf_counter()
        return Budget(now + share * max(self.end - now, 0.0))


def is_steady(timing: Timing) -> bool:
    """Return whether repeats say well enough what their median is (see above)."""
    if timing.repeats < FEWEST:
        return False
    return NOTCH * (timing.p75 - timing.p25) / sqrt(timing.repeats) <= STEADY * timing.p50


@dataclass(frozen=True, slots=True)
class Repeats:
    """The seconds that each repeat of a call took: on the clock, and of the processor, on all threads together."""

    passed: tuple[float, ...] = ()
    worked: tuple[float, ...] = ()

    def __add__(self, other: Repeats) -> Repeats:
        """Return these repeats and then others."""
        return Repeats(self.passed + other.passed, self.worked + other.worked)

    @property
    def timing(self) -> Timing:
        """What they say, of at least one."""
        return Timing.of(self.passed, self.worked)


def in_turns(calls: Sequence[Call], budget: Budget, most: int | None = None) -> list[Repeats]:
    """Repeat each call, after one that warms up: each once, whatever the budget, then a few of one, a few of the next, and
    again, until all are steady. Each has as many repeats as the others. most: unset, MOST.

    In between is a pause: until the idle threads of one session stop spinning, they take cores from the other.
    """
    for call in calls:
        call()
    found = [Repeats() for _ in calls]
    runs = 1
    while runs > 0:
        begin = time.perf_counter()
        for place, call in enumerate(calls):
            time.sleep(PAUSE_SECONDS)
            for _ in range(runs):
                found[place] += _repeat(call)
        if all(is_steady(each.timing) for each in found):
            break
        now = time.perf_counter()
        fitting = (budget.end - now) * runs / max(now - begin, 1e-9)  # a turn that would end too late is not begun
        runs = min(BLOCK, (most or MOST) - len(found[0].passed), int(max(min(fitting, BLOCK), 0)))
    return found


def _repeat(call: Call) -> Repeats:
    passed, worked = time.perf_counter(), time.process_time()
    call()
    return Repeats((time.perf_counter() - passed,), (time.process_time() - worked,))
