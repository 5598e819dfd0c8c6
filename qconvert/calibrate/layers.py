"""The planned layers of every unit, as quantizers are given them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers.pytorch_utils import Conv1D

from qconvert.ir.layer import CalibrationStats, Layer, LinearGroup
from qconvert.ir.model import Model
from qconvert.ir.plan import LayerPlan
from qconvert.ir.template import InputGroup

Layers = Mapping[str, LayerPlan]


def groups_by_unit(model: Model, layers: Layers, groups: Sequence[InputGroup]) -> dict[str, list[InputGroup]]:
    """Return the input groups of every unit's planned layers, with the producers that a smoothing scale can be folded into."""
    units: dict[str, list[InputGroup]] = defaultdict(list)
    grouped: set[str] = set()
    for group in groups:
        planned = tuple(name for name in group.layers if name in layers)
        if planned:
            unit = model.block_of(planned[0])
            foldable = len(planned) == len(group.layers) and _may_fold(model, layers, unit, group)
            units[unit].append(replace(group, layers=planned, producer=group.producer if foldable else None))
            grouped.update(planned)
    for name in layers:
        if name not in grouped:
            units[model.block_of(name)].append(InputGroup((name,), None))
    return dict(units)


def _may_fold(model: Model, layers: Layers, unit: str, group: InputGroup) -> bool:
    """A scale can move into the producer only where the unit holds all that changes, and nothing else uses it.

    (A layer of the group that stays in float would have to be scaled too; so would the other user of a tied weight.)
    A Conv1D that stays in float does not serve: its outputs are the columns of the tensor that it leaves in the block.
    """
    producer = group.producer
    if producer and producer.name not in layers and isinstance(model.module.get_submodule(producer.name), Conv1D):
        return False
    names = [*group.layers, *([group.producer.name] if group.producer else [])]
    tied = {*model.tied, *model.tied.values()}
    return all(model.block_of(name) == unit and not tied.intersection(own_parameters(model, name)) for name in names)


def linear_group(model: Model, layers: Layers, group: InputGroup, stats: CalibrationStats | None) -> LinearGroup:
    """Return the layers of a group, their weights as the source holds them."""
    return LinearGroup(tuple(_layer(model, layers, name, stats) for name in group.layers), group.producer, stats)


def _layer(model: Model, layers: Layers, name: str, stats: CalibrationStats | None) -> Layer:
    kind, bias = layers[name].kind, f"{name}.bias"
    weight = model.read(f"{name}.weight")
    read_bias = model.read(bias) if bias in own_parameters(model, name) else None
    return Layer(name, kind, weight.T if kind == "conv1d" else weight.flatten(1), read_bias, stats)


def own_parameters(model: Model, name: str) -> list[str]:
    """Return the full names of the parameters that a module itself has, [] where there is no such module."""
    try:
        module = model.module.get_submodule(name)
    except AttributeError:
        return []
    return [f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
