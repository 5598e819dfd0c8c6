"""The work that the cores did while something was measured: this process's, and that of other programs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Self

import psutil

# Names of psutil.cpu_times; some systems have only the first of each. "guest" is part of "user".
BUSY, IDLE = ("user", "system", "nice", "irq", "softirq", "steal"), ("idle", "iowait")
# Where less of the time that has passed is accounted for, as in some sandboxes, the system's figures mean nothing.
SMALLEST_COUNT = 0.5


@dataclass(frozen=True, slots=True)
class CoreTimes:
    """Seconds since some moment in the past: passed, spent by this process on all of its threads, and spent busy and at all
    by the cores that it may run on, `cores` of them."""

    passed: float
    own: float
    busy: float
    counted: float
    cores: int

    @classmethod
    def now(cls) -> Self | None:
        """Read the times of this moment; None where the system does not tell them."""
        try:
            every = psutil.cpu_times(percpu=True)
        except (OSError, RuntimeError, NotImplementedError):
            return None
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(every))
        cores = [times for index, times in enumerate(every) if index in allowed]
        busy, idle = (sum(getattr(times, name, 0.0) for times in cores for name in names) for names in (BUSY, IDLE))
        return cls(time.perf_counter(), time.process_time(), busy, busy + idle, len(cores))

    def others_share_since(self, before: CoreTimes) -> float | None:
        """Return the share of the cores' time that other programs took, 0 to 1; None where the system's figures are useless."""
        available = (self.passed - before.passed) * self.cores
        if not available or self.counted - before.counted < SMALLEST_COUNT * available:
            return None
        others = (self.busy - before.busy) - (self.own - before.own)
        return min(max(others / available, 0.0), 1.0)


def core_count() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def others_share(before: CoreTimes | None) -> float | None:
    """Return `CoreTimes.others_share_since` from `before` until now; None where the system does not tell."""
    now = CoreTimes.now()
    return None if before is None or now is None else now.others_share_since(before)
