"""Whether a KV cache can be kept in codes: there has to be one, an operator that holds it, and a kernel on every target."""

from __future__ import annotations

from qconvert.errors import UsageError
from qconvert.graph.cache_codes import is_all_cached
from qconvert.ir.model import Model
from qconvert.ir.template import Template
from qconvert.recipe import Recipe
from qconvert.targets import targets_of


def check_cache(model: Model, recipe: Recipe) -> None:
    """Check what is known before a model is traced. Raises UsageError QC-PLAN-018 and QC-PLAN-019."""
    if not model.task.continues_prompts:
        raise _no_operator(model, recipe, "it is no decoder-only language model")
    missing = next((target.name for target in targets_of(recipe.targets) if not target.takes_cache_codes), None)
    if missing is not None:
        raise UsageError(
            "QC-PLAN-019",
            f"there is no graph with an {recipe.kv_cache} cache for {missing}: nobody has seen its kernel compute one",
            hint=f"leave out --target {missing}, or keep the cache in float, which is {recipe.cuda_dtype} on {missing}",
        )


def check_cache_graph(model: Model, template: Template, recipe: Recipe) -> None:
    """Check the graph that was traced. Raises UsageError QC-PLAN-018."""
    if not is_all_cached(template.graphs["model"].graph):
        raise _no_operator(model, recipe, "something else than GroupQueryAttention reads its cache")


def _no_operator(model: Model, recipe: Recipe, reason: str) -> UsageError:
    return UsageError(
        "QC-PLAN-018",
        f"{model.name} can't have an {recipe.kv_cache} cache: {reason}",
        hint="leave out kv_cache: caches are in float then",
    )
