"""The allocate stage: which scheme every layer gets, so that the whole keeps a budget and loses as little as possible."""

from __future__ import annotations

import glob
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from qconvert.allocate.choices import Choice, choice_bytes, choices, stored_bytes
from qconvert.allocate.knapsack import solve
from qconvert.allocate.sensitivity import measure_losses
from qconvert.allocate.static import keep_within
from qconvert.errors import UsageError
from qconvert.ir.budget import Budget
from qconvert.ir.decision import Assignment
from qconvert.ir.layer import Block
from qconvert.ir.plan import Plan
from qconvert.ir.progress import Progress
from qconvert.ir.scheme import QuantScheme
from qconvert.job import Job
from qconvert.recipe import Recipe
from qconvert.recipe.fields import Rule

__all__ = ["allocate", "keep_within"]


def allocate(blocks: Iterable[Block], job: Job, progress: Progress) -> tuple[Recipe, Assignment]:
    """Decide on a scheme for every layer: return the recipe that a recipe with a budget comes down to, with a rule for every
    layer, and what it is expected to lose.

    blocks: with the statistics that the quantizer wants, see `calibrate`.
    job: its plan is that of the recipe before anything is decided; layers that a rule names are as it says.

    Raises UsageError QC-BUDGET-004 to -006 where nothing can be decided, and what `calibrate` and the quantizer raise.
    """
    model, plan, recipe = job.model, job.plan, job.recipe
    waiting = choices(plan, job.template.groups, recipe, model)
    budget = Budget.parse(recipe.budget or "")
    room = _room(plan, waiting, budget)
    by_shape = [[choice_bytes(plan, choice, scheme) for scheme in choice.schemes] for choice in waiting]
    if sum(map(min, by_shape)) > room:  # which is known before anything is measured
        raise _too_small(plan, waiting, by_shape, budget)
    progress.stage("allocate", len({model.block_of(name) for name in plan.layers}))
    weighed = measure_losses(blocks, job, waiting, progress)
    chosen = solve([each.options for each in weighed], room)
    if chosen is None:
        raise _too_small(plan, waiting, [[option.cost for option in each.options] for each in weighed], budget)
    schemes = {
        name: each.choice.schemes[option] for each, option in zip(weighed, chosen, strict=True) for name in each.choice.layers
    }
    lost = sum(each.options[option].loss for each, option in zip(weighed, chosen, strict=True))
    taken = sum(each.options[option].cost for each, option in zip(weighed, chosen, strict=True))
    assignment = Assignment(
        budget=str(budget),
        average_bits=8 * (taken + _fixed_bytes(plan, waiting)) / _weights(plan),
        predicted_kl=lost if model.task.generates else None,
        predicted_error=None if model.task.generates else lost**0.5,
        schemes=dict(Counter(str(schemes.get(name, layer.scheme)) for name, layer in plan.layers.items()).most_common()),
    )
    return _decided(recipe, schemes), assignment


def _decided(recipe: Recipe, schemes: dict[str, QuantScheme]) -> Recipe:
    """Return the recipe with the scheme that most layers get, and a rule in front for each layer that gets another one."""
    (default, _), *_ = Counter(schemes.values()).most_common()
    rules = [Rule(pattern=glob.escape(name), scheme=scheme) for name, scheme in schemes.items() if scheme != default]
    return recipe.decided(default, rules)


def _room(plan: Plan, waiting: Sequence[Choice], budget: Budget) -> int:
    """Bytes that the layers of `waiting` may take."""
    floats = plan.weights_bytes - sum(layer.nbytes for layer in plan.layers.values())
    return budget.quantized_bytes(_weights(plan), floats) - _fixed_bytes(plan, waiting)


def _fixed_bytes(plan: Plan, waiting: Sequence[Choice]) -> int:
    """Return the bytes of the layers whose scheme a rule says."""
    free = {name for choice in waiting for name in choice.layers}
    return sum(stored_bytes(layer) for name, layer in plan.layers.items() if name not in free)


def _weights(plan: Plan) -> int:
    return sum(layer.out_features * layer.in_features for layer in plan.layers.values())


def _too_small(plan: Plan, waiting: Sequence[Choice], costs: Sequence[Sequence[int]], budget: Budget) -> UsageError:
    """costs: per choice what each scheme takes."""
    fixed = _fixed_bytes(plan, waiting)
    ends = [fixed + sum(map(pick, costs)) for pick in (min, max)]
    if budget.in_bytes:
        floats = plan.weights_bytes - sum(layer.nbytes for layer in plan.layers.values())
        least, most = (f"{end + floats}B" for end in ends)
    else:  # rounded up, so that the least is enough
        least, most = (f"{math.ceil(8000 * end / _weights(plan)) / 1000:.3f}" for end in ends)
    return UsageError(
        "QC-BUDGET-006",
        f"the budget {budget} can't be met: from {least}, all layers in their smallest scheme, to {most} is possible",
        hint=f"take --budget {least} or more; a --rule quantizes what is kept in float",
    )
