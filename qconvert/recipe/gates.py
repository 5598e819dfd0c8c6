"""Gates: limits that an artifact must keep."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, Self, get_args

from pydantic import (
    Field,
)

from qconvert.errors import UsageError
from qconvert.ir.task import Task
from qconvert.recipe.fields import Part
from qconvert.vocabulary import Metric


class Gate(Part):
    """A limit that the artifact must keep, e.g. kl <= 0.2 or cosine >= 0.99."""

    metric: Metric = Field(description="a number of report.json, which the task must have")
    comparison: Literal["<=", ">="]
    limit: float

    def __str__(self) -> str:
        """Return the gate as the command line takes it: 'kl<=0.2'."""
        return f"{self.metric}{self.comparison}{self.limit:.12g}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse what `str` gives. Raises UsageError QC-RECIPE-003."""
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*([-+.\deE]+)\s*", text)
        try:
            if match is None:
                raise ValueError
            return cls(metric=match[1], comparison=match[2], limit=float(match[3]))
        except ValueError as error:  # pydantic's ValidationError is a ValueError
            metrics = ", ".join(cls.model_fields["metric"].annotation.__args__)  # type: ignore[union-attr]
            raise UsageError(
                "QC-RECIPE-003",
                f"'{text}' is not a gate",
                hint=f"write METRIC<=LIMIT or METRIC>=LIMIT, METRIC one of {metrics}",
            ) from error


def refuse_gates(gates: Sequence[Gate], task: Task | None) -> None:
    """Raise UsageError QC-GATE-002 for gates on a metric that a task does not have. task: None where it is not known yet."""
    lacking = [str(gate) for gate in gates if task is not None and gate.metric in task.unmeasured]
    if task is not None and lacking:
        measured = [metric for metric in get_args(Metric) if metric not in task.unmeasured]
        raise UsageError(
            "QC-GATE-002",
            f"{', '.join(lacking)}: that is not measured of a model whose task is {task.name}",
            hint=f"take one of {', '.join(measured)}",
        )
