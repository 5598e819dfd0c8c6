"""Plan: what a run will do with every module, and why not, before anything is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from torch import nn

from qconvert.errors import UsageError
from qconvert.execution.modules import as_matrix, layer_kind
from qconvert.ir.artifact import weight_file_names
from qconvert.ir.contents import shards
from qconvert.ir.decision import KeptFloat
from qconvert.ir.layer import LayerKind
from qconvert.ir.model import Model
from qconvert.ir.plan import LayerPlan, Plan
from qconvert.ir.scheme import QuantScheme, no_kernel
from qconvert.ir.template import Template
from qconvert.plan.cache import check_cache, check_cache_graph
from qconvert.plan.cast import cast_plan
from qconvert.plan.fit import Fitting
from qconvert.plan.peaks import peaks
from qconvert.plan.prefill import check_prompt_weights, check_prompts
from qconvert.plan.sizes import average_bits, deployment
from qconvert.plan.targets import check_targets, cuda_bytes
from qconvert.plan.tied import modules_that_share, shared_heads
from qconvert.plugin.host import contract
from qconvert.plugin.quantizer import Quantizer
from qconvert.recipe import Recipe
from qconvert.recipe.budget import refuse_budget
from qconvert.recipe.fields import Rule
from qconvert.recipe.gates import refuse_gates


def plan(model: Model, template: Template, recipe: Recipe, quantizer: Quantizer) -> Plan:
    """Decide on every module of the model.

    Raises UsageError QC-PLAN-001 to QC-PLAN-020 for a scheme that the quantizer, the kernels or the layout can't carry,
    for rules that match nothing, or give a layer by its name what does not fit it; QC-CUDA-001 for what the CUDA provider
    has no kernel for, where that is a target; QC-CAST-004 for a cast that changes nothing.
    """
    check(model, recipe)
    if recipe.kv_cache != "float":
        check_cache_graph(model, template, recipe)
    if recipe.cast is not None:
        return cast_plan(model, template, recipe, quantizer, _unread(model, template))
    default = recipe.quantized_scheme or quantizer.default_scheme
    layers, kept, shared = _sort_modules(model, template, recipe, default)
    _check_rules(recipe, [*layers, *shared, *(entry.name for entry in kept)])
    _check_schemes(default, layers.values(), recipe, quantizer)
    fitting = Fitting(recipe, quantizer, model, shared)
    layers, misfits = fitting.fit(layers)
    kept += misfits
    apart = {head: embedding for head, embedding in shared.items() if embedding not in layers}
    kept += [KeptFloat(name=head, reason=_shares((embedding,))) for head, embedding in apart.items()]
    if not layers:
        raise UsageError(
            "QC-PLAN-006",
            f"no layer of {model.name} would be quantized: " + "; ".join(sorted({entry.reason for entry in kept})),
            hint="check the rules, and that the model has linear or Conv2d layers",
        )
    _check_trained(model, layers)
    _check_layout(fitting.layout_refuses(layers.values()))
    _check_tuning(layers.values(), recipe)
    check_targets(model, template, layers, recipe)
    replaced = {model.stored_name(f"{name}.weight") for name in layers}
    floats = {name: info for name, info in model.source.tensors.items() if name not in replaced}
    made = Plan(
        default,
        layers,
        tuple(kept),
        calibrated=calibrates(recipe, quantizer),
        kv_cache=recipe.kv_cache,
        weights_bytes=sum(info.nbytes for info in floats.values()) + sum(layer.nbytes for layer in layers.values()),
        peaks=peaks(model, template.groups, layers, recipe, quantizer),
        prefill=recipe.prefill,
        shared={head: embedding for head, embedding in shared.items() if head not in apart},
        targets=recipe.targets,
        cuda_bytes=cuda_bytes(floats, layers, recipe),
        unread=_unread(model, template),
    )
    check_prompt_weights(made)
    return dataclasses.replace(
        made,
        weight_files=weight_file_names(len(shards(model, made))),
        average_bits=average_bits(layers.values()),
        deployment=deployment(model, template, made),
    )


def check(model: Model, recipe: Recipe) -> None:
    """Check that a model suits a recipe, as far as that is known before it is traced.

    Raises UsageError QC-PLAN-011, QC-PLAN-017 to QC-PLAN-020, QC-GATE-002, QC-BUDGET-008.
    """
    if recipe.logits == "last" and not model.task.continues_prompts:
        raise UsageError(
            "QC-PLAN-011",
            f"{model.name} has no logits of a last position: it is no decoder-only language model",
            hint="leave out 'logits: last'",
        )
    if recipe.keeps_adapter and recipe.layout == "transformers" and model.config is not None:
        raise UsageError(
            "QC-PLAN-017",
            "transformers would load this folder without the adapter that stays beside the layers",
            hint="add --layout onnx for a folder that serves ONNX Runtime alone, or --merge-adapter",
        )
    if recipe.kv_cache != "float":
        check_cache(model, recipe)
    if recipe.prefill != "same":
        check_prompts(model, recipe)
    refuse_gates(recipe.gates, model.task)
    refuse_budget(recipe.loss_budget, model.task)


def calibrates(recipe: Recipe, quantizer: Quantizer) -> bool:
    """Return whether calibration data is needed."""
    finds_ranges = is_static(recipe, quantizer) and recipe.trained is None
    return bool(quantizer.observers) or recipe.tuning is not None or finds_ranges or recipe.kv_cache != "float"


def is_static(recipe: Recipe, quantizer: Quantizer) -> bool:
    """Return whether any scheme that a recipe asks for has ranges of activations that calibration is to find."""
    asked = (recipe.quantized_scheme or quantizer.default_scheme, *(rule.scheme for rule in recipe.rules if rule.scheme))
    return recipe.cast is None and any(scheme.is_static for scheme in asked)


def _sort_modules(
    model: Model, template: Template, recipe: Recipe, default: QuantScheme
) -> tuple[dict[str, LayerPlan], list[KeptFloat], dict[str, str]]:
    """Every module with a weight of its own: planned, kept in float for a reason, or a head that shares a planned embedding."""
    reached = {*template.embeddings, *(name for group in template.groups for name in group.layers)}
    sharing = modules_that_share(model)
    shared = shared_heads(model, recipe, reached)
    heads = {embedding: head for head, embedding in shared.items()}
    layers: dict[str, LayerPlan] = {}
    kept = []
    for name, module in model.module.named_modules():
        if name in shared or not any(True for _ in module.parameters(recurse=False)):
            continue
        kind, head = layer_kind(module), heads.get(name)
        named = recipe.rule_for(name) or (recipe.rule_for(head) if head else None)
        scheme = named.scheme if named else default
        reasons = (
            "it belongs to the adapter" if name in model.adapter else None,
            _no_layer(module, kind),
            _needs_a_rule(kind, named),
            _shares(sharing[name]) if name in sharing and head is None else None,
            None if name in reached else "the exported graph does not use it as a layer",
            _ruled_out(named) if scheme is None else None,
            _taken_name(model, name),
            _head_needs_a_rule(name, named, default) if name == model.output_head else None,
        )
        reason = next(filter(None, reasons), None)
        if reason is not None or kind is None or scheme is None:
            kept.append(KeptFloat(name=name, reason=reason or ""))
            continue
        out_features, in_features = as_matrix(module).shape
        # A convolution has no kernel that quantizes each row: it is small on disk, and computes in float.
        activations = None if kind == "conv2d" and not scheme.is_static else scheme.activations
        own = dataclasses.replace(scheme, activations=activations, scale_bits=model.scale_bits)
        layers[name] = LayerPlan(
            name, kind, out_features, in_features, own, name in template.weights_read, dtype=model.loaded_dtype
        )
    return layers, kept, shared


def _no_layer(module: nn.Module, kind: LayerKind | None) -> str | None:
    if kind is not None:
        return None
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) and "weight" not in module._parameters:
        return "its weight is computed at every call"
    return f"{type(module).__name__} is not quantized"


def _needs_a_rule(kind: LayerKind | None, named: Rule | None) -> str | None:
    unnamed = kind == "embedding" and named is None
    return "an embedding stays in float unless a rule names it" if unnamed else None


def _ruled_out(named: Rule | None) -> str:
    return named.reason if named and named.reason else "a rule keeps it in float"


def _head_needs_a_rule(name: str, named: Rule | None, default: QuantScheme) -> str | None:
    return None if named else f"the output head stays in float unless a rule names it: --rule '{name}={default}'"


def _taken_name(model: Model, layer: str) -> str | None:
    """Return whether a tensor of the model has a name which the quantized layer needs for one of its own."""
    own = re.compile(re.escape(layer) + r"\.((weight|kernel|outlier|cuda)_\w+|input_factor|weight\..+)")
    taken = next((name for name in (*model.source.tensors, *model.tied) if own.fullmatch(name)), None)
    return taken and f"the model itself has {taken}, as a tensor of the quantized layer would be called"


def _unread(model: Model, template: Template) -> dict[str, str]:
    """Stored tensors that no graph computes with -> why. Not buffers: tracing makes them constants of other names."""
    read = {model.stored_name(name) for name in template.parameters_read()}
    parameters = {model.stored_name(name) for name in model.parameter_shapes}
    unread = {name: "the exported graph has no use for it" for name in model.source.tensors if name in parameters - read}
    return {**unread, **model.unplaced}


def _shares(others: Iterable[str]) -> str:
    return f"shares its weight with {', '.join(others)}, which stays in float"


def _check_schemes(default: QuantScheme, layers: Iterable[LayerPlan], recipe: Recipe, quantizer: Quantizer) -> None:
    """Every scheme that is asked for; a quantizer with observers has no say in embeddings (qconvert.quantize)."""
    asked = {default, *(rule.scheme for rule in recipe.rules if rule.scheme)}
    if quantizer.observers:
        asked -= {layer.scheme for layer in layers if layer.form.is_embedding} - {
            layer.scheme for layer in layers if not layer.form.is_embedding
        }
    for scheme in sorted(asked, key=str):
        _check_scheme(scheme, quantizer)


def _check_scheme(scheme: QuantScheme, quantizer: Quantizer) -> None:
    if not scheme.has_kernel:
        raise no_kernel(scheme)
    reason = contract.refuses(quantizer, scheme)
    if reason is not None:
        raise UsageError(
            "QC-PLAN-002",
            f"quantizer {quantizer.name} can't produce {scheme}: {reason}",
            hint=f"its default is {quantizer.default_scheme}",
        )


def _check_rules(recipe: Recipe, names: list[str]) -> None:
    for rule in recipe.rules:
        if not any(rule.matches(name) for name in names):
            raise UsageError(
                "QC-PLAN-003",
                f"the rule '{rule.pattern}' matches no layer",
                hint=f"patterns are fnmatch on full module names, such as {names[0]}",
            )


def _check_tuning(layers: Iterable[LayerPlan], recipe: Recipe) -> None:
    """Tuners move scales and roundings, which of codebooks are bitsandbytes' own."""
    found = next((layer for layer in layers if layer.scheme.codebook is not None), None)
    if found is not None and recipe.tuning is not None:
        raise UsageError(
            "QC-PLAN-016",
            f"{found.name} ({found.scheme}) can't be tuned: its codes are places in a codebook",
            hint="leave out tuning, or take a scheme of integers, such as int4-g32",
        )


def _check_trained(model: Model, layers: Mapping[str, LayerPlan]) -> None:
    """A model that was trained with codes is converted with those, by the recipe that it was trained with."""
    if model.trained is None:
        return
    trained = model.trained.layers
    for name in (*layers, *trained):
        planned = str(layers[name].scheme) if name in layers else "float"
        found = str(trained[name].scheme) if name in trained else "float"
        if planned != found:
            raise UsageError(
                "QC-TRAIN-004",
                f"{name} was trained as {found}, and the recipe makes it {planned}",
                hint="give the schemes and rules that prepare_qat was given",
            )


def _check_layout(reason: str | None) -> None:
    if reason is not None:
        raise UsageError(
            "QC-PLAN-005",
            f"transformers could not load this folder: {reason}",
            hint="add --layout onnx for a folder that serves ONNX Runtime alone, or change what is named here with a --rule",
        )
