"""Quantization-aware training: a module is made ready by a recipe, trained by whoever has it, and converted with its codes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qconvert.errors import UsageError
from qconvert.ir.progress import silent
from qconvert.load import load
from qconvert.pipeline import preflight
from qconvert.pipeline.staged import staged
from qconvert.plan import plan as make_plan
from qconvert.recipe import Recipe, adapter_beside_codes
from qconvert.trace import trace
from qconvert.trace.batch_norm import fold_batch_norms
from qconvert.training import prepare
from qconvert.vocabulary import AUTO, CAST, TRAINED

if TYPE_CHECKING:
    from qconvert.training import Module

    AnyModule = TypeVar("AnyModule", bound=Module)


def prepare_qat(module: AnyModule, recipe: Recipe, *, learned_steps: bool = False) -> AnyModule:
    """Make a module ready for quantization-aware training, in place, and return it.

    Batch norms are folded into the convolutions before them. Every layer that the recipe's schemes and rules quantize then
    computes with what the codes of its weight, and of its input where the scheme has activations, stand for; gradients pass
    straight through. Train it as any module, then give it to `convert`. Of the recipe, model, scheme and rules count; its
    quantizer only where no scheme is named.

    module: of the architecture that `recipe.model` describes, with any weights.
    learned_steps: let step sizes be parameters (LSQ), instead of covering the range that weights and inputs have.

    Raises UsageError QC-TRAIN-001 for a module of another architecture, QC-TRAIN-002 for a recipe that names no schemes, and
    what planning raises.
    """
    recipe = trainable(recipe)
    plugins = preflight.plugins_of(recipe)
    with staged(silent):
        model = load(recipe.model, plugins.load_model)
        model, template, folds = fold_batch_norms(model, trace(model))
        plan = make_plan(model, template, recipe, plugins.quantizer(TRAINED, {}))
        prepare(module, model, template, plan, folds, learned_steps=learned_steps)
    return module


def trainable(recipe: Recipe, trained: Path | None = None) -> Recipe:
    """Return the recipe of a model that is trained by `recipe`. trained: its file, once there is one.

    Raises UsageError QC-TRAIN-002, QC-ADAPTER-006.
    """
    if recipe.quantizer in (AUTO, CAST):
        raise UsageError(
            "QC-TRAIN-002",
            f"the quantizer {recipe.quantizer} has no schemes to train with",
            hint="give a scheme, such as int8-channel-a8-static, and rules",
        )
    if recipe.budget is not None:
        raise UsageError(
            "QC-TRAIN-002", f"the budget {recipe.budget} is given to training, which decides nothing", hint="leave it out"
        )
    scheme = recipe.scheme
    if scheme is None and recipe.quantizer != TRAINED:
        scheme = preflight.plugins_of(recipe).quantizer(recipe.quantizer, recipe.options).default_scheme
    unused: dict[str, Any] = {"options": {}, "tuning": None, "sequential": False, "ranges": None, "preset": None}
    if trained is not None and recipe.adapter is not None:
        raise adapter_beside_codes(recipe.adapter)
    return recipe.model_copy(update={**unused, "scheme": scheme, "quantizer": TRAINED, "trained": trained})
