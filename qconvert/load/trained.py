"""A model with what quantization-aware training has made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from qconvert.errors import InputError
from qconvert.execution.modules import in_own_shape
from qconvert.ir.model import Model, TensorInfo
from qconvert.ir.trained import Trained, TrainedSource
from qconvert.storage.trained import SCALE, ZERO_POINT, TrainedFile

UNWRAPPED = (
    "train the module that the recipe's model describes, and save it without a wrapper around it: of peft, what "
    "merge_and_unload() gives"
)


def with_trained(model: Model, path: Path) -> Model:
    """Return a model with what was trained beside it; its source still gives the weights from before.

    These are exchanged once batch norms are folded, as they were for training (ir.trained.TrainedSource).

    Raises InputError QC-TRAIN-003 for a file that is damaged or of another model.
    """
    file = TrainedFile.open(path)
    buffers = dict(model.module.named_buffers())
    for name in file.infos.keys() & buffers.keys():
        buffers[name].copy_(file.read(name))
    trained = Trained(file.layers, file.codes, FileSource(file, model))
    return dataclasses.replace(model, trained=trained, input_files={**model.input_files, f"trained:{path.name}": path})


def as_trained(model: Model) -> Model:
    """Return a model `with_trained`, batch norms folded, with the weights that were trained.

    Raises InputError QC-TRAIN-003 where one is missing, or is of another shape.
    """
    assert model.trained is not None
    trained = model.trained.source
    for parameter, shape in model.parameter_shapes.items():
        info = trained.tensors.get(model.stored_name(parameter))
        if info is None or info.shape != shape:
            found = "is not among what was trained" if info is None else f"was trained as {list(info.shape)}"
            raise InputError(
                "QC-TRAIN-003",
                f"{parameter} {list(shape)} of {model.name} {found}",
                hint=UNWRAPPED,
            )
    return dataclasses.replace(model, source=TrainedSource(model.source, trained))


class FileSource:
    """The trained tensors of a file under the names of a model. A TensorSource."""

    def __init__(self, file: TrainedFile, model: Model) -> None:
        self._file, self._modules = file, dict(model.module.named_modules())
        self._names = {model.stored_name(name): name for name in file.infos}

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All of them; the weight of a layer with codes in float32 and in the shape that its module has."""
        beside = {name + suffix for name in self._file.layers for suffix in (SCALE, ZERO_POINT)}
        infos = {name: info for name, info in self._file.infos.items() if name not in beside}
        infos |= {f"{name}.weight": self._weight_info(name) for name in self._file.layers}
        return {stored: infos[name] for stored, name in self._names.items() if name in infos}

    def read(self, name: str) -> Tensor:
        """Return a tensor; the weight of a layer with codes is what they stand for."""
        name = self._names[name]
        layer = name.removesuffix(".weight")
        if layer not in self._file.layers:
            return self._file.read(name)
        weight = self._file.codes(layer).dequantize()
        return self._in_own_shape(layer, weight).contiguous()

    def _weight_info(self, layer: str) -> TensorInfo:
        shape = self._file.infos[f"{layer}.weight"].shape
        return TensorInfo(torch.float32, tuple(self._in_own_shape(layer, torch.empty(shape, device="meta")).shape))

    def _in_own_shape(self, layer: str, weight: Tensor) -> Tensor:
        module = self._modules.get(layer)
        if module is None:
            raise InputError("QC-TRAIN-003", f"the trained layer {layer} is not in the model", hint=UNWRAPPED)
        if isinstance(module, torch.nn.BatchNorm2d):  # a norm that became a convolution of each channel alone
            return weight.reshape(-1, 1, 1, 1)
        return in_own_shape(module, weight)
