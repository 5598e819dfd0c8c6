"""Which layers stay in float beside static activations, so that the output loses no more than a budget allows.

What counts is the loss of the whole: errors of activations reach far, and add up in ways that no single layer tells. So graphs
are run, in which some layers are static and the others float, with weights and activations rounded as they will be. First
each layer is static alone, which tells what it loses. Those that lose most for each product of numbers that they take go to
float, as many as are needed, found by bisection; and of these each goes back into codes if the budget is still kept, first
those with most products. That is done once more with those that lose most of all, since a large layer may lose more than the
budget by itself, and the better of the two counts. n layers take n runs over FEW samples, and at most 2 n + 2 log2(n) + 3
over all of them.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from qconvert.allocate.choices import stored_bytes
from qconvert.allocate.output_loss import OutputLoss
from qconvert.allocate.trials import Trials
from qconvert.errors import UsageError
from qconvert.execution.trial_weights import TrialWeights
from qconvert.graph.quantized_values import is_opaque_product
from qconvert.ir.activation_codes import GraphCodes
from qconvert.ir.budget import LossBudget
from qconvert.ir.decision import Assignment
from qconvert.ir.progress import Progress
from qconvert.ir.template import module_of
from qconvert.job import Job
from qconvert.recipe import Recipe
from qconvert.recipe.fields import Rule

# Samples on which the loss of each layer alone is measured.
FEW = 8

# Layers that read the same value: they are static together, or float.
Group = tuple[str, ...]


def keep_within(job: Job, weights: TrialWeights, codes: GraphCodes, progress: Progress) -> tuple[Recipe, Assignment]:
    """Decide which layers stay in float: return the recipe that a recipe with a budget on the loss comes down to, with a rule
    for each of these layers, and what the output is expected to lose.

    job: its plan has all layers static that no rule names. weights, codes: of that plan.

    Raises UsageError QC-BUDGET-004 where there is nothing to decide, QC-BUDGET-009 where too much is lost with any layer in
    codes, and what `Trials` raises.
    """
    budget, scheme = job.recipe.loss_budget, job.recipe.quantized_scheme
    assert budget is not None
    assert scheme is not None
    groups = _groups(job)
    progress.stage("allocate", len(groups))
    search = _Search(Trials(job, weights, codes), groups, budget, progress)
    kept, loss = search.run()
    rules = [
        Rule(pattern=glob.escape(name), scheme=None, reason=_reason(group, budget, search.alone[group]))
        for group in groups
        if group in kept
        for name in group
    ]
    return job.recipe.decided(scheme, rules), _assignment(job, _names(kept), budget, loss)


def _groups(job: Job) -> list[Group]:
    """The layers on which the budget decides, those with a common input together."""
    free = [name for name in job.plan.layers if job.plan.is_static_layer(name) and job.recipe.rule_for(name) is None]
    if not free:
        raise UsageError("QC-BUDGET-004", "the rules leave no layer on which a budget could decide", hint="take fewer rules")
    reading = {name: index for index, group in enumerate(job.template.groups) for name in group.layers}
    together: dict[object, list[str]] = {}
    for name in free:
        together.setdefault(reading.get(name, name), []).append(name)
    return list(map(tuple, together.values()))


# Groups that stay in float, and what the output loses then.
Found = tuple[frozenset[Group], OutputLoss]


@dataclass
class _Search:
    """The search for the groups that stay in float."""

    trials: Trials
    groups: Sequence[Group]
    budget: LossBudget
    progress: Progress
    losses: dict[frozenset[Group], OutputLoss] = field(default_factory=dict)

    def run(self) -> Found:
        """Return the groups that stay in float, so that as much as possible is multiplied in codes.

        Raises UsageError QC-BUDGET-009.
        """
        everything = frozenset[Group]()
        if self._keeps_budget(everything):
            return everything, self._loss(everything)
        by_loss = sorted(self.groups, key=lambda group: -self.alone[group].mean)
        by_product = sorted(self.groups, key=lambda group: -self.alone[group].mean / self.products[group])
        found = [kept for order in (by_product, by_loss) if (kept := self._first_of(order)) is not None]
        if not found:
            raise self._too_strict(by_loss)
        kept = min(found, key=lambda kept: sum(self.products[group] for group in kept))
        return kept, self._loss(kept)

    @cached_property
    def alone(self) -> Mapping[Group, OutputLoss]:
        """What the output loses with one group static, beside what the rules name."""
        found = {}
        for group in self.groups:
            found[group] = self.trials.loss(_names(set(self.groups) - {group}), FEW)
            self.progress.advance()
        return found

    @cached_property
    def products(self) -> Mapping[Group, int]:
        """How many products of numbers each group takes for a sample."""
        products = _products(self.trials.job)
        return {group: max(1, sum(products[name] for name in group)) for group in self.groups}

    def _first_of(self, order: Sequence[Group]) -> frozenset[Group] | None:
        """Return as many of the first groups as keep the budget in float, without those that need not be; None where even all
        that may be there do not keep it.
        """
        few, many = 0, self._most  # so many in float do not keep the budget, and do
        if not self._keeps_budget(frozenset(order[:many])):
            return None
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (few, middle) if self._keeps_budget(frozenset(order[:middle])) else (middle, many)
        kept = frozenset(order[:many])
        for group in sorted(kept, key=lambda group: (-self.products[group], group)):
            if self._keeps_budget(kept - {group}):
                kept -= {group}
        return kept

    @property
    def _most(self) -> int:
        """How many groups may be in float: one is left, unless something is quantized in any case."""
        return len(self.groups) - (0 if self._is_ruled else 1)

    @property
    def _is_ruled(self) -> bool:
        return len(self.trials.job.plan.layers) > len(_names(self.groups))

    def _loss(self, kept: frozenset[Group]) -> OutputLoss:
        if kept not in self.losses:
            self.losses[kept] = self.trials.loss(_names(kept))
        return self.losses[kept]

    def _keeps_budget(self, kept: frozenset[Group]) -> bool:
        return self._loss(kept).bound <= self.budget.allowed

    def _too_strict(self, by_loss: Sequence[Group]) -> UsageError:
        least = "what the rules name" if self._is_ruled else ", ".join(by_loss[-1])
        words, loss = self.budget.words, self._loss(frozenset(by_loss[: self._most]))
        return UsageError(
            "QC-BUDGET-009",
            f"the budget {self.budget} can't be kept: with no more than {least} in codes calibration samples have "
            f"{words(loss.mean)}, and {words(loss.bound)} with a margin for others",
            hint="allow more, give more calibration samples, or take activations of 16 bits: int8-channel-a16-static",
        )


def _names(groups: Sequence[Group] | frozenset[Group] | set[Group]) -> frozenset[str]:
    return frozenset(name for group in groups for name in group)


def _products(job: Job) -> Counter[str]:
    """How many products of numbers each layer takes for one sample, where a length that differs between samples counts once."""
    found: Counter[str] = Counter()
    for part in job.template.graphs.values():
        for node in filter(is_opaque_product, part.graph):
            name, shape = module_of(node), node.outputs[0].shape
            if name in job.plan.layers:
                sizes = [size for size in (shape or ()) if isinstance(size, int)]
                found[name] += prod(sizes) * job.plan.layers[name].in_features
    return found


def _reason(group: Group, budget: LossBudget, alone: OutputLoss) -> str:
    who = "it" if len(group) == 1 else f"{len(group)} layers of one input"
    return f"the budget {budget} keeps it in float ({budget.words(alone.mean)} with {who} alone in codes)"


def _assignment(job: Job, in_float: frozenset[str], budget: LossBudget, loss: OutputLoss) -> Assignment:
    layers = [layer for name, layer in job.plan.layers.items() if name not in in_float]
    schemes = Counter(str(layer.scheme) for layer in layers) + Counter({"float": len(in_float)})
    return Assignment(
        budget=str(budget),
        average_bits=8 * sum(map(stored_bytes, layers)) / sum(layer.out_features * layer.in_features for layer in layers),
        predicted_kl=loss.mean if budget.metric == "kl" else None,
        predicted_cosine=1 - loss.mean if budget.metric == "cosine" else None,
        schemes=dict(schemes.most_common()),
    )
