"""Embeddings and output heads that share one weight: quantized together, as one tensor, or not at all."""

from __future__ import annotations

from collections.abc import Collection

from qconvert.errors import UsageError
from qconvert.execution.modules import layer_kind
from qconvert.ir.model import Model
from qconvert.recipe import Recipe


def modules_that_share(model: Model) -> dict[str, tuple[str, ...]]:
    """Return, for each module, the others that use the same weight; another name of the same module does not count."""
    users: dict[str, list[str]] = {}
    for alias, owner in model.tied.items():
        if alias.endswith(".weight") and owner.endswith(".weight"):
            users.setdefault(owner, [owner]).append(alias)
    modules = {name for name, _ in model.module.named_modules()}
    named = [[name for each in names if (name := each.removesuffix(".weight")) in modules] for names in users.values()]
    return {name: tuple(other for other in names if other != name) for names in named if len(names) > 1 for name in names}


def shared_heads(model: Model, recipe: Recipe, reached: Collection[str]) -> dict[str, str]:
    """Return the output heads that read the quantized tensor of an embedding, as head -> embedding.

    A rule gives one of each pair a scheme.

    reached: the modules that are layers in the graph.
    Raises UsageError QC-PLAN-008 where rules want two things of one tensor.
    """
    heads = {}
    for head, others in modules_that_share(model).items():
        if len(others) != 1 or not {head, *others} <= set(reached):
            continue
        embedding = others[0]
        kinds = [layer_kind(model.module.get_submodule(name)) for name in (head, embedding)]
        if kinds != ["linear", "embedding"]:
            continue
        rules = {name: recipe.rule_for(name) for name in (head, embedding)}
        wanted = {name: rule.scheme for name, rule in rules.items() if rule}
        if len(set(wanted.values())) > 1:
            raise UsageError(
                "QC-PLAN-008",
                f"{head} and {embedding} share one weight, but the rules say {wanted[head] or 'float'} for the one and "
                f"{wanted[embedding] or 'float'} for the other",
                hint="give both the same scheme; a rule for one of them is enough",
            )
        if any(wanted.values()):
            heads[head] = embedding
    return heads
