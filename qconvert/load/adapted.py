"""A model with a LoRA adapter: kept as a branch beside its layers, or merged into their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from qconvert.errors import InputError
from qconvert.execution.adapter_branch import DOWN, UP, add_branch
from qconvert.execution.modules import as_matrix, layer_kind
from qconvert.ir.model import Model, TensorInfo, TensorSource
from qconvert.load.adapter import Adapter, open_adapter, tensor_name


def with_adapter(model: Model, folder: Path, *, merged: bool) -> Model:
    """Return a model that computes with the adapter in a folder. Its module, unless merged, gets the branches in place.

    merged: put the adapter into the weights of its layers; else lora_A and lora_B stay beside them, the scaling in lora_B.

    Raises InputError QC-ADAPTER-003 for a layer that the model has not, or has in another shape, 005 for a weight that other
    layers share and the adapter would be merged into; and what `open_adapter` raises.
    """
    adapter = open_adapter(folder)
    shapes = {name: _shape_of(model, name, folder) for name in adapter.scalings}
    for name, shape in shapes.items():
        _check_fit(adapter, name, shape, folder)
    inputs = {**model.input_files, **{f"adapter:{name}": path for name, path in adapter.files.items()}}
    if merged:
        for name in shapes:
            _refuse_shared(model, name)
        return dataclasses.replace(model, source=MergedSource(model, adapter), input_files=inputs)
    parts = []
    for name, shape in shapes.items():
        children = add_branch(model.module.get_submodule(name), adapter.ranks[name], shape)
        parts += [f"{name}.{child}" for child in children]
    source = BranchSource(model.source, adapter)
    return dataclasses.replace(model, source=source, input_files=inputs, adapter=frozenset(parts))


def _shape_of(model: Model, name: str, folder: Path) -> tuple[int, int]:
    """[out, in] of the layer that an adapter names."""
    module = dict(model.module.named_modules()).get(name)
    if module is None or layer_kind(module) not in ("linear", "conv1d"):
        found = f"has no {name}" if module is None else f"has {name} as {type(module).__name__}, which is no linear layer"
        raise InputError(
            "QC-ADAPTER-003",
            f"{folder} adapts {name}, and the model {model.name} {found}",
            hint="give the model that the adapter was trained on, as the class that it was trained as",
        )
    out, width = as_matrix(module).shape
    return out, width


def _check_fit(adapter: Adapter, name: str, shape: tuple[int, int], folder: Path) -> None:
    out, width = shape
    for part, axis, size in ((DOWN, 1, width), (UP, 0, out)):
        tensor = tensor_name(name, part)
        found = adapter.source.tensors[tensor].shape
        if found[axis] != size:
            raise InputError(
                "QC-ADAPTER-003",
                f"{folder}: {tensor!a} is {list(found)}, and {name} of the model is {list(shape)}",
                hint="give the model that the adapter was trained on",
            )


def _refuse_shared(model: Model, name: str) -> None:
    weight = f"{name}.weight"
    others = [each for each in (*model.tied, *model.tied.values()) if model.stored_name(each) == model.stored_name(weight)]
    shared = next((each for each in others if each != weight), None)
    if shared is not None:
        raise InputError(
            "QC-ADAPTER-005",
            f"{weight} is {shared} as well, which the adapter would change too if it was merged into it",
            hint="leave out --merge-adapter, and take --layout onnx; or train without that layer",
        )


class MergedSource:
    """The tensors of a model with an adapter in the weights of its layers, made when they are read. A TensorSource."""

    def __init__(self, model: Model, adapter: Adapter) -> None:
        self._source, self._adapter = model.source, adapter
        self._transposed = {name: isinstance(model.module.get_submodule(name), Conv1D) for name in adapter.scalings}

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name; weights with an adapter in them are float32."""
        merged = {f"{name}.weight" for name in self._adapter.scalings}
        return {
            name: TensorInfo(torch.float32, info.shape) if name in merged else info
            for name, info in self._source.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """Return a tensor: W + scaling * lora_B lora_A where a layer has an adapter."""
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or layer not in self._adapter.scalings:
            return self._source.read(name)
        down, up = self._adapter.matrices(layer)
        change = up @ down
        change = change.T if self._transposed[layer] else change
        return (self._source.read(name).float() + change * self._adapter.scalings[layer]).contiguous()


class BranchSource:
    """The tensors of a model with those of the branches beside its layers. A TensorSource."""

    def __init__(self, source: TensorSource, adapter: Adapter) -> None:
        self._source, self._adapter = source, adapter
        self._own = {f"{name}.{part}.weight": (name, part) for name in adapter.scalings for part in (DOWN, UP)}

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, those of the branches last and in float32."""
        own = self._adapter.source.tensors
        branches = {
            name: TensorInfo(torch.float32, own[tensor_name(layer, part)].shape) for name, (layer, part) in self._own.items()
        }
        return {**self._source.tensors, **branches}

    def read(self, name: str) -> Tensor:
        """Return a tensor; a lora_B with the scaling in it."""
        if name not in self._own:
            return self._source.read(name)
        layer, part = self._own[name]
        down, up = self._adapter.matrices(layer)
        return down if part == DOWN else up * self._adapter.scalings[layer]
