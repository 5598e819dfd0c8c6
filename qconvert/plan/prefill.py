"""Whether prompts can have int8 weights of their own, which takes prompts, the CPU, and packed weights to derive them from."""

from __future__ import annotations

from collections.abc import Iterable

from qconvert.errors import UsageError
from qconvert.ir.layer_form import LayerForm
from qconvert.ir.plan import LayerPlan
from qconvert.ir.prompt_weights import PROMPT_BITS
from qconvert.recipe import Recipe
from qconvert.targets import targets_of
from qconvert.targets.cpu import CPU
from qconvert.vocabulary import Prefill

PACKED = (LayerForm.PACKED_WEIGHTS, LayerForm.PACKED_EMBEDDING)


def check_prefill(layers: Iterable[LayerPlan], recipe: Recipe) -> None:
    """Check what is known once every layer has its scheme. Raises UsageError QC-PLAN-020.

    layers: those that multiply.
    """
    if recipe.prefill == "same":
        return
    if CPU not in targets_of(recipe.targets):
        raise no_prompts(recipe.prefill, f"it is for {CPU.name}, and the artifact is for {', '.join(recipe.targets)}")
    if not any(layer.form in PACKED and layer.scheme.bits in PROMPT_BITS for layer in layers):
        raise no_prompts(recipe.prefill, "no linear layer has packed weights of 4 or 8 bits and float activations")


def no_prompts(prefill: Prefill, reason: str) -> UsageError:
    """Return the error QC-PLAN-020 for a recipe whose `prefill` has nothing to work on."""
    return UsageError("QC-PLAN-020", f"there is no use for prefill: {prefill}: {reason}", hint="leave out prefill")
