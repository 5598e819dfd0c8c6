"""The file that keeps what quantization-aware training has made of a model: codes, scales, and the floats beside them.

A safetensors file. A layer that was trained with codes has NAME.weight as int8 codes [out, in], NAME.weight_scale
[out, groups] float32 and, of asymmetric schemes, NAME.weight_zero_point int8; every other tensor lies there as it is. The
metadata, one JSON document, names of every such layer its scheme and the codes of its input.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from qconvert.errors import InputError, QConvertError
from qconvert.ir.activation_codes import ActivationCodes
from qconvert.ir.model import TensorInfo
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.trained import TrainedLayer
from qconvert.storage.disk import disk_errors
from qconvert.storage.safetensors import read_header

DOCUMENT = "qconvert"  # the key of the metadata
VERSION = 1
SCALE, ZERO_POINT = ".weight_scale", ".weight_zero_point"


def write_trained(path: Path, layers: Mapping[str, tuple[QuantizedTensor, TrainedLayer]], floats: Mapping[str, Tensor]) -> None:
    """Write the file in one step. floats: all other tensors, by name. Raises ResourceError (disk)."""
    tensors = dict(floats)
    for name, (quantized, _) in layers.items():
        tensors[f"{name}.weight"], tensors[name + SCALE] = quantized.q, quantized.scale
        if quantized.zero_point is not None:
            tensors[name + ZERO_POINT] = quantized.zero_point
    document = {
        "version": VERSION,
        "layers": {name: _document(layer) for name, (_, layer) in layers.items()},
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                temporary,
                metadata={DOCUMENT: json.dumps(document)},
            )
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _document(layer: TrainedLayer) -> dict[str, Any]:
    codes = {} if layer.input_codes is None else {"input": dataclasses.asdict(layer.input_codes)}
    return {"scheme": str(layer.scheme), **codes}


@dataclass(frozen=True, eq=False)
class TrainedFile:
    """An opened file. layers: those with codes; infos: of all tensors."""

    path: Path
    layers: Mapping[str, TrainedLayer]
    infos: Mapping[str, TensorInfo]

    @staticmethod
    def open(path: Path) -> TrainedFile:
        """Read what the file says of itself.

        Raises InputError QC-TRAIN-003 for a file that write_trained has not written, QC-INPUT-... for damaged safetensors.
        """
        if not path.is_file():
            raise InputError("QC-TRAIN-003", f"there is no file {path}", hint="write it with qconvert.save_trained")
        infos = {name: entry.info for name, entry in read_header(path).items()}
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        try:
            document = json.loads(metadata[DOCUMENT])
            if document["version"] != VERSION:
                raise ValueError(f"version {document['version']}")
            layers = {str(name): _layer(layer) for name, layer in document["layers"].items()}
            found = TrainedFile(path, layers, infos)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, QConvertError) as error:
            raise _unreadable(path, f"does not say what was trained ({type(error).__name__}: {error})") from error
        for name, layer in layers.items():
            found._check(name, layer.scheme)
        return found

    def _check(self, name: str, scheme: QuantScheme) -> None:
        weight = self.infos.get(f"{name}.weight")
        if weight is None or len(weight.shape) != 2:
            raise _unreadable(self.path, f"has no codes for {name}")
        width = weight.shape[1]
        if width % scheme.group_size(width):
            raise _unreadable(self.path, f"says that {name} of width {width} is {scheme}")
        shape = scheme.scale_shape(*weight.shape)
        wanted = {
            f"{name}.weight": TensorInfo(torch.int8, weight.shape),
            name + SCALE: TensorInfo(torch.float32, shape),
        } | ({} if scheme.symmetric else {name + ZERO_POINT: TensorInfo(torch.int8, shape)})
        for tensor, info in wanted.items():
            if self.infos.get(tensor) != info:
                raise _unreadable(self.path, f"has {tensor} as {self.infos.get(tensor)}; {info} is wanted")

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored."""
        with safetensors.safe_open(self.path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def codes(self, layer: str) -> QuantizedTensor:
        """Return the quantized weight of a layer. Raises InputError QC-TRAIN-003 for codes that its scheme has not."""
        scheme = self.layers[layer].scheme
        zero_point = None if scheme.symmetric else self.read(layer + ZERO_POINT)
        tensor = QuantizedTensor(self.read(f"{layer}.weight"), self.read(layer + SCALE), zero_point, scheme)
        low, high = scheme.code_range
        if not (tensor.scale.isfinite().all() and low <= int(tensor.q.min()) and int(tensor.q.max()) <= high):
            raise _unreadable(self.path, f"has codes or scales of {layer} that {scheme} has not")
        return tensor


def _layer(document: Mapping[str, Any]) -> TrainedLayer:
    codes = ActivationCodes(**document["input"]) if "input" in document else None
    return TrainedLayer(QuantScheme.parse(document["scheme"]), codes)


def _unreadable(path: Path, what: str) -> InputError:
    return InputError("QC-TRAIN-003", f"{path} {what}", hint="write it anew with qconvert.save_trained")
