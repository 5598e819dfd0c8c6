"""The contents of model.safetensors or its shards, known before anything is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qconvert.ir.model import Model, TensorInfo
from qconvert.ir.plan import LayerPlan, Plan

# What the tensors of one file may take: where transformers 4 and huggingface_hub divide by default.
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class Unit:
    """A block, or "" for all that lies outside blocks.

    layers: the quantized layers by name.
    floats: name in the output -> name in the source, of the tensors that stay as they are.
    """

    name: str
    layers: Mapping[str, LayerPlan]
    floats: Mapping[str, str]


def units(model: Model, plan: Plan) -> tuple[Unit, ...]:
    """Return the units in the order of the file: blocks, then "". Every source tensor is in one of them, or quantized."""
    layers: dict[str, dict[str, LayerPlan]] = {name: {} for name in (*model.blocks, "")}
    floats: dict[str, dict[str, str]] = {name: {} for name in layers}
    for name, layer in plan.layers.items():
        layers[model.block_of(name)][name] = layer
    for output, source in float_tensors(model, plan).items():
        floats[model.block_of(output)][output] = source
    return tuple(Unit(name, layers[name], floats[name]) for name in layers)


def float_tensors(model: Model, plan: Plan) -> dict[str, str]:
    """Return the name in the source of everything but the weights of quantized layers, by its name in the output.

    A tied tensor is kept, once, if any of its users stays float: then it goes under the name of that user, because a
    loader does not expect a float weight beside the packed one of a quantized layer.
    """
    quantized = {f"{name}.weight" for name in (*plan.layers, *plan.shared)}
    floats: dict[str, str] = {}
    for stored in model.source.tensors:
        users = (stored, *(alias for alias, target in model.tied.items() if target == stored))
        kept = next((user for user in users if user not in quantized), None)
        if kept is not None:
            floats[kept] = stored
    return floats


def shards(model: Model, plan: Plan) -> tuple[dict[str, TensorInfo], ...]:
    """Return the tensors of each file of weights, in the order of the units, scales as float32: the most that they can take.

    There is one file, or each takes at most SHARD_BYTES, or is a single tensor. Units are kept whole where one file can hold
    them, so that the layers that a graph computes as one still lie one behind the other.
    """
    every = [largest(model, plan, unit) for unit in units(model, plan)]
    if plan.weights_bytes <= SHARD_BYTES:
        return ({name: info for tensors in every for name, info in tensors.items()},)
    files: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for part in (part for tensors in every for part in _parts(tensors)):
        added = _bytes(part)
        if files[-1] and size + added > SHARD_BYTES:
            files.append({})
            size = 0
        files[-1] |= part
        size += added
    return tuple(files)


def _parts(tensors: dict[str, TensorInfo]) -> list[dict[str, TensorInfo]]:
    """What must not be divided of a unit: all of it, or each tensor of one that is too large."""
    return [tensors] if _bytes(tensors) <= SHARD_BYTES else [{name: info} for name, info in tensors.items()]


def _bytes(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(info.nbytes for info in tensors.values())


def float_info(model: Model, cast: Mapping[str, torch.dtype], source: str) -> TensorInfo:
    """Return how a tensor of the source is written that is not quantized. cast: see Plan."""
    info = model.source.tensors[source]
    return TensorInfo(cast.get(source, info.dtype), info.shape)


def largest(model: Model, plan: Plan, unit: Unit) -> dict[str, TensorInfo]:
    """Return the tensors of a unit, scales as float32: the most that they can take."""
    tensors: dict[str, TensorInfo] = {}
    for name, layer in unit.layers.items():
        tensors |= {f"{name}.{suffix}": info for suffix, info in layer.disk_tensors.items()}
        if "weight_scale" in layer.disk_tensors:
            tensors[f"{name}.weight_scale"] = TensorInfo(torch.float32, layer.disk_tensors["weight_scale"].shape)
    return tensors | {output: float_info(model, plan.cast, source) for output, source in unit.floats.items()}
