"""What a recipe's budget goes with."""

from __future__ import annotations

from qconvert.errors import UsageError
from qconvert.ir.budget import LossBudget, parse_budget
from qconvert.ir.scheme import Cast, QuantScheme
from qconvert.ir.task import Task
from qconvert.vocabulary import AUTO


def check_budget(budget: str | None, quantizer: str, scheme: QuantScheme | Cast | None) -> None:
    """Raise UsageError QC-BUDGET-002, -003 or -007 for a budget with what it does not go with."""
    parsed = None if budget is None else parse_budget(budget)
    if isinstance(parsed, LossBudget):
        if not (isinstance(scheme, QuantScheme) and scheme.is_static):
            raise UsageError(
                "QC-BUDGET-007",
                f"the budget {budget} decides which layers have static activations, and the recipe "
                + (f"wants {scheme}, which has none" if scheme else "names no scheme that has some"),
                hint="give --scheme int8-channel-a8-static; a budget for weights alone is average bits, such as 4.5, or a size",
            )
        return
    if (parsed is not None) != (quantizer == AUTO):
        given, missing = ("a budget", f"the quantizer {AUTO}") if parsed else (f"the quantizer {AUTO}", "a budget")
        raise UsageError(
            "QC-BUDGET-002",
            f"{given} is given without {missing}",
            hint=f"schemes are chosen with both: --quantizer {AUTO} --budget 4.5",
        )
    if parsed is not None and scheme is not None:
        raise UsageError(
            "QC-BUDGET-003",
            f"the budget {budget} decides the schemes, but the recipe wants {scheme}",
            hint="leave out the scheme; a rule may name those of single layers",
        )


def refuse_budget(budget: LossBudget | None, task: Task | None) -> None:
    """Raise UsageError QC-BUDGET-008 for a budget on what a task does not lose. task: None where it is not known yet."""
    if budget is not None and task is not None and budget.metric in task.unmeasured:
        other = "cosine>=0.999" if task.generates is False else "kl<=0.05"
        raise UsageError(
            "QC-BUDGET-008",
            f"the budget {budget}: {budget.metric} is not measured of a model whose task is {task.name}",
            hint=f"write one such as {other}",
        )
