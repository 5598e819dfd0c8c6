"""Whether prompts can have int8 weights of their own, which takes prompts, the CPU, and packed weights to derive them from."""

from __future__ import annotations

from collections.abc import Iterable

from qconvert.errors import UsageError
from qconvert.ir.layer_form import LayerForm
from qconvert.ir.model import Model
from qconvert.ir.plan import LayerPlan
from qconvert.ir.prompt_weights import PROMPT_BITS
from qconvert.recipe import Recipe
from qconvert.targets import targets_of
from qconvert.targets.cpu import CPU
from qconvert.vocabulary import Prefill

PACKED = (LayerForm.PACKED_WEIGHTS, LayerForm.PACKED_EMBEDDING)


def check_prompts(model: Model, recipe: Recipe) -> None:
    """Check what is known before a model is traced. Raises UsageError QC-PLAN-020 and QC-PLAN-021."""
    if not model.task.continues_prompts:
        raise _no_prompts(recipe.prefill, f"{model.name} is no decoder-only language model")
    if recipe.kv_cache != "float":
        raise UsageError(
            "QC-PLAN-021",
            f"prefill: {recipe.prefill} and kv_cache: {recipe.kv_cache} do not go together yet: no graph has both",
            hint="leave out one: prefill makes prompts faster, kv_cache makes long contexts smaller",
        )


def check_prefill(layers: Iterable[LayerPlan], recipe: Recipe) -> None:
    """Check what is known once every layer has its scheme. Raises UsageError QC-PLAN-020.

    layers: those that multiply.
    """
    if recipe.prefill == "same":
        return
    if CPU not in targets_of(recipe.targets):
        raise _no_prompts(recipe.prefill, f"it is for {CPU.name}, and the artifact is for {', '.join(recipe.targets)}")
    if not any(layer.form in PACKED and layer.scheme.bits in PROMPT_BITS for layer in layers):
        raise _no_prompts(recipe.prefill, "no linear layer has packed weights of 4 or 8 bits and float activations")


def _no_prompts(prefill: Prefill, reason: str) -> UsageError:
    return UsageError("QC-PLAN-020", f"there is no use for prefill: {prefill}: {reason}", hint="leave out prefill")
