"""Comparison: what became of several recipes on one model, exactly as compare.json holds it (schema 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qconvert.errors import QConvertError
from qconvert.ir.report import Fidelity, Latency, Report
from qconvert.ir.task import TASKS, Task

FILE = "compare.json"
PLOT = "compare.png"


@dataclass(frozen=True)
class Entry:
    """One recipe of a comparison, and what came of it.

    scheme: of the layers that no rule names.
    report: None where there is no artifact.
    error: why there is none, or none that could be run.
    quantize_seconds: what quantizing and writing took, without the calibration that all share, but with the one of a recipe
        that calibrates on its own; None where it failed.
    """

    name: str
    quantizer: str
    scheme: str
    report: Report | None = None
    error: QConvertError | None = None
    quantize_seconds: float | None = None

    @property
    def passed(self) -> bool | None:
        """The verdict of its report; without one it has failed."""
        return self.report.passed if self.report else False

    @property
    def fidelity(self) -> Fidelity | None:
        """The fidelity on the first target that was run."""
        return next((part for part in self.report.fidelity if part.status == "passed"), None) if self.report else None

    @property
    def latency(self) -> Latency | None:
        """The latency on the target that `fidelity` is of."""
        found = self.report.latency if self.report and self.fidelity else ()
        return next((part for part in found if self.fidelity and part.target == self.fidelity.target), None)

    @property
    def loss(self) -> float | None:
        """The loss against the float model, 0 at best: KL in nats for models that write text, 1 - cosine for all others."""
        if self.report is None or self.fidelity is None:
            return None
        if TASKS[self.report.task].generates:
            return self.fidelity.kl
        # Rounding leaves a cosine of equal vectors above 1.
        return None if self.fidelity.cosine is None else max(0.0, 1 - self.fidelity.cosine)


@dataclass(frozen=True)
class Comparison:
    """The recipes that were tried on one model, in the order in which they were given."""

    model: str
    task: Task
    entries: tuple[Entry, ...]

    @cached_property
    def front(self) -> frozenset[str]:
        """The names of the recipes that no other beats in both size and loss."""
        return pareto_front(self.points)

    @cached_property
    def points(self) -> dict[str, tuple[float, float]]:
        """The (bytes of weights, loss) of each recipe whose artifact was run, by its name."""
        return {
            entry.name: (entry.report.size.weights_bytes, entry.loss)
            for entry in self.entries
            if entry.report is not None and entry.loss is not None
        }

    def document(self) -> dict[str, Any]:
        """Return the JSON document of compare.json. A number that a task has no use for, or that nobody measured, is absent."""
        return {
            "schema": 1,
            "model": self.model,
            "task": self.task.name,
            "recipes": [_document(entry, entry.name in self.front) for entry in self.entries],
        }


def pareto_front(points: Mapping[str, Sequence[float]]) -> frozenset[str]:
    """Return the points that no other dominates: none is as small in every coordinate and smaller in one. Equal points stay."""

    def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
        pairs = list(zip(one, other, strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return frozenset(name for name, point in points.items() if not any(dominates(each, point) for each in points.values()))


def _document(entry: Entry, on_front: bool) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    if entry.report is not None:
        size = entry.report.size
        measured |= {"weights_bytes": size.weights_bytes, "ratio": size.ratio, "average_bits": size.average_bits}
    if entry.fidelity is not None:
        measured |= entry.fidelity.model_dump(include={"target", "kl", "top1", "perplexity", "cosine"})
    if entry.latency is not None:
        measured |= entry.latency.model_dump(
            include={"prefill_tokens_per_s", "decode_tokens_per_s", "p50_ms", "float_p50_ms", "speedup", "others_share"}
        )
    measured["quantize_seconds"] = entry.quantize_seconds
    error = entry.error
    return {
        "name": entry.name,
        "quantizer": entry.quantizer,
        "scheme": entry.scheme,
        "passed": entry.passed,
        **{key: value for key, value in measured.items() if value is not None},
        "pareto": on_front,
        "error": {"code": error.code, "message": error.message, "hint": error.hint} if error else None,
    }
