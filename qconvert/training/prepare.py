"""A module made ready for quantization-aware training: batch norms folded, layers fake-quantized as a plan says."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from qconvert.errors import UsageError
from qconvert.execution.batch_norm import Fold
from qconvert.execution.modules import as_matrix, layer_kind
from qconvert.graph.layer_inputs import inputs_of_layers
from qconvert.ir.activations import row_codes
from qconvert.ir.model import Model
from qconvert.ir.plan import Plan
from qconvert.ir.template import Template
from qconvert.training.inputs import RowInput, StaticInput
from qconvert.training.layers import FakeQuantized, become_fake_quantized
from qconvert.training.weights import WeightQuantizer


def prepare(
    module: nn.Module, model: Model, template: Template, plan: Plan, folds: Mapping[str, str], *, learned_steps: bool
) -> None:
    """Make `module` one that is trained with the codes of a plan, in place.

    model, template: of the same architecture, batch norms folded. folds: convolution -> the batch norm that goes into it, which
    is itself where the norm becomes the convolution.

    Raises UsageError QC-TRAIN-001 for a module of another architecture, or one that was made ready before; QC-TRAIN-002 for
    scales that are quantized in their turn.
    """
    if any(isinstance(each, FakeQuantized) for each in module.modules()):
        raise UsageError("QC-TRAIN-001", "the module was prepared before", hint="prepare the float module, and once")
    double = next((layer for layer in plan.layers.values() if layer.scheme.double_quant), None)
    if double is not None:
        raise UsageError(
            "QC-TRAIN-002",
            f"{double.name} ({double.scheme}) can't be trained: its scales are codes too",
            hint="leave out -dq",
        )
    names = [*plan.layers, *plan.shared]
    _check(module, model, [*names, *(each for each in folds if each not in names)], folds)
    for convolution, norm in folds.items():
        _fold(module, convolution, norm)
    weights = {
        name: WeightQuantizer(layer.scheme, as_matrix(module.get_submodule(name)), learned=learned_steps)
        for name, layer in plan.layers.items()
    }
    inputs = _inputs(template, plan, learned=learned_steps)
    for name in names:
        layer = module.get_submodule(name)
        quantizer = weights[plan.shared.get(name, name)].to(layer.get_parameter("weight").device)
        become_fake_quantized(layer, quantizer, inputs.get(name, nn.Identity()).to(layer.get_parameter("weight").device))
        layer.train(module.training)


def _check(module: nn.Module, model: Model, names: list[str], folds: Mapping[str, str]) -> None:
    """Nothing is changed in a module that is of another architecture."""
    for norm_name in folds.values():
        norm = _found(module, norm_name)
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
            raise _another(f"{norm_name} is {type(norm).__name__}, where the recipe's model has a batch norm")
    for name in names:
        found, wanted = _found(module, name), model.module.get_submodule(name)
        if isinstance(found, nn.BatchNorm2d) and name in folds.values():
            continue  # it becomes a convolution
        if layer_kind(found) != layer_kind(wanted) or as_matrix(found).shape != as_matrix(wanted).shape:
            raise _another(f"{name} is {found}, where the recipe's model has {wanted}")


def _fold(module: nn.Module, convolution: str, norm_name: str) -> None:
    """Put a batch norm, with the statistics that it has, into the convolution before it, or make it one."""
    norm = module.get_submodule(norm_name)
    assert isinstance(norm, nn.BatchNorm2d)
    fold = Fold.of(norm_name, norm)
    if convolution == norm_name:
        conv = nn.Conv2d(norm.num_features, norm.num_features, 1, groups=norm.num_features, bias=False)
        conv.to(device=norm.weight.device, dtype=norm.weight.dtype)
        nn.init.ones_(conv.weight)
        module.set_submodule(norm_name, conv)
    else:
        before = module.get_submodule(convolution)
        assert isinstance(before, nn.Conv2d)
        conv = before
        module.set_submodule(norm_name, nn.Identity())
    with torch.no_grad():
        conv.weight.copy_(fold.weight(conv.weight, norm.weight))
        bias = fold.bias(conv.bias, norm.weight, norm.bias)
        if conv.bias is None:
            conv.bias = nn.Parameter(torch.empty_like(norm.bias))
        conv.bias.copy_(bias)


def _found(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise _another(f"it has no {name}") from None


def _another(problem: str) -> UsageError:
    return UsageError(
        "QC-TRAIN-001",
        f"the module is not what the recipe's model is: {problem}",
        hint="give the module that the recipe's model describes, without a wrapper around it",
    )


def _inputs(template: Template, plan: Plan, *, learned: bool) -> dict[str, nn.Module]:
    """What quantizes the input of each layer that computes with codes of it.

    Layers that read one value share one where its range is static: that value has one pair of nodes in the graph.
    """
    found: dict[str, nn.Module] = {}
    together: list[tuple[set[str], StaticInput]] = []
    for value in inputs_of_layers([graph.graph for graph in template.graphs.values()]):
        static = {name for name in value.layers if plan.is_static_layer(name)}
        joined = [each for each in together if each[0] & static]
        for name in value.layers:
            layer = plan.layer_of(name)
            if layer is not None and layer.scheme.activations is not None and name not in static:
                found[name] = RowInput(row_codes(value.made_by))
        if static:
            how = next(layer.scheme.activations for name in static if (layer := plan.layer_of(name)))
            assert how is not None
            names = static.union(*(each[0] for each in joined))
            together = [each for each in together if each not in joined]
            together.append((names, joined[0][1] if joined else StaticInput(how, learned=learned)))
    return found | {name: quantizer for names, quantizer in together for name in names}
