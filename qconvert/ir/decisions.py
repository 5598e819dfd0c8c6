"""What a plan decides and a report tells: which modules stay in float, and which schemes a budget came to.

Apart from the plan, so that reports and recipes need no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class KeptFloat:
    """A module that stays in float, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Assignment:
    """What `auto` decided. average_bits: of all quantized weights. schemes: name -> number of layers.

    predicted_kl in nats, for models that write text; predicted_error: of the output, relative, for others. Both are sums over
    what each layer loses alone, on calibration data.
    """

    budget: str
    average_bits: float
    schemes: Mapping[str, int]
    predicted_kl: float | None = None
    predicted_error: float | None = None

    def document(self) -> dict[str, Any]:
        """The JSON document of it; what a task has no use for is absent."""
        return {key: value for key, value in asdict(self).items() if value is not None}
