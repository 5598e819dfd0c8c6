"""Whether prompts can have int8 weights of their own, which takes prompts, the CPU, and packed weights to derive them from."""

from __future__ import annotations

from qconvert.errors import UsageError
from qconvert.ir.layer_form import LayerForm
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.prompt_weights import PROMPT_BITS
from qconvert.recipe import Recipe
from qconvert.targets import targets_of
from qconvert.targets.cpu import CPU
from qconvert.vocabulary import Prefill


def check_prompts(model: Model, recipe: Recipe) -> None:
    """Check what is known before a model is traced. Raises UsageError QC-PLAN-020."""
    if not model.task.continues_prompts:
        raise _no_prompts(recipe.prefill, f"{model.name} is no decoder-only language model")
    if CPU not in targets_of(recipe.targets):
        raise _no_prompts(recipe.prefill, f"it is for {CPU.name}, and the artifact is for {', '.join(recipe.targets)}")


def check_prompt_weights(plan: Plan) -> None:
    """Check that there is anything to derive weights from. Raises UsageError QC-PLAN-020."""
    if plan.prefill != "same" and not any(prompt_weight_count(plan, name) for name in (*plan.layers, *plan.shared)):
        raise _no_prompts(plan.prefill, "no linear layer has packed weights of 4 or 8 bits and float activations")


def prompt_weight_count(plan: Plan, name: str) -> int:
    """Return how many int8 weights the module `name` has for prompts."""
    layer = plan.layer_of(name)
    if plan.prefill == "same" or layer is None or layer.scheme.bits not in PROMPT_BITS:
        return 0
    return layer.out_features * layer.in_features if plan.form_of(name) is LayerForm.PACKED_WEIGHTS else 0


def _no_prompts(prefill: Prefill, reason: str) -> UsageError:
    return UsageError("QC-PLAN-020", f"there is no use for prefill: {prefill}: {reason}", hint="leave out prefill")
