"""What a plan has decided and a report tells too; torch is not needed to read it."""

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
    """What a budget decided. average_bits: of all quantized weights. schemes: name -> number of layers; "float": those that
    stay in float for a budget on the loss.

    predicted_kl in nats, for models that write text; predicted_error: of the output, relative, for others. Both are sums over
    what each layer loses alone, on calibration data. For a budget on the loss, predicted_kl and predicted_cosine are what the
    whole lost there, of the output that loses most.
    """

    budget: str
    average_bits: float
    schemes: Mapping[str, int]
    predicted_kl: float | None = None
    predicted_error: float | None = None
    predicted_cosine: float | None = None

    @property
    def limits_loss(self) -> bool:
        """Whether the budget says what may be lost, and not what weights may take."""
        return "=" in self.budget

    def document(self) -> dict[str, Any]:
        """The JSON document of it; what a task has no use for is absent."""
        return {key: value for key, value in asdict(self).items() if value is not None}
