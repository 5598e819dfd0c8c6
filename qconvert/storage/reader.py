"""Tensors from the bytes of an output folder, also of one that is still being written.

Format of model.safetensors and of its shards: 8 bytes header length (little-endian), a JSON header, tensor data without gaps
(https://github.com/huggingface/safetensors#format). The sidecar has no header: qconvert.json holds its index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconvert.errors import InputError
from qconvert.ir.activation_ranges import ActivationRanges
from qconvert.ir.artifact import MANIFEST, SIDECAR, WEIGHTS, WEIGHTS_INDEX, StoredTensor, weight_file_names
from qconvert.ir.decision import Assignment
from qconvert.ir.plan import LayerPlan
from qconvert.ir.quantized import Outliers, QuantizedTensor
from qconvert.ir.report import LayerReport
from qconvert.ir.write_result import WriteResult
from qconvert.storage import layout
from qconvert.storage.json_text import parse_json
from qconvert.storage.manifest import read_manifest
from qconvert.storage.mapped import map_file, mapped_tensor
from qconvert.storage.safetensors import DTYPE_NAMES, DTYPES, Entry, read_header


def tensor_record(tensor: StoredTensor) -> dict[str, Any]:
    """Return the JSON form of a StoredTensor, without its file."""
    return {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "offset": tensor.offset}


def stored_tensor(file: str, record: Mapping[str, Any]) -> StoredTensor:
    """Undo `tensor_record`."""
    dtype, shape = DTYPES[record["dtype"]], tuple(record["shape"])
    return StoredTensor(file, dtype, shape, record["offset"], dtype.itemsize * torch.Size(shape).numel())


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Return where every tensor of a finished folder lies, weights and sidecar together.

    Raises InputError QC-READ-001 if a file is missing or its index is damaged.
    """
    index = folder / WEIGHTS_INDEX
    weights = _read_shards(index) if index.exists() else _read_weights(folder / WEIGHTS)
    with _readable(folder / MANIFEST):
        sidecar = read_manifest(folder)["sidecar"]
        return weights | {name: stored_tensor(SIDECAR, record) for name, record in sidecar.items()}


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    """Where the tensors lie that the index of a sharded folder names, which are all that its shards hold."""
    with _readable(index):
        weight_map = parse_json(index.read_bytes())["weight_map"]
        names = weight_file_names(len(set(weight_map.values())))
        if set(names) != set(weight_map.values()):
            raise ValueError("it does not name all shards, or other files")
        weights = {name: tensor for file in names for name, tensor in _read_weights(index.parent / file).items()}
        if weight_map != {name: tensor.file for name, tensor in weights.items()}:
            raise ValueError("it does not say what the shards hold")
    return weights


def _read_weights(path: Path) -> dict[str, StoredTensor]:
    with _readable(path):
        return {name: _stored(path.name, entry) for name, entry in read_header(path).items()}


def _stored(file: str, entry: Entry) -> StoredTensor:
    return StoredTensor(file, entry.info.dtype, entry.info.shape, entry.start, entry.stop - entry.start)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what is wrong with a file into InputError QC-READ-001."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, str(error)) from error
    except InputError as error:
        raise error if error.code == "QC-READ-001" else _unreadable(path, error.message) from error


def _unreadable(path: Path, problem: str) -> InputError:
    return InputError(
        "QC-READ-001", f"{path} can't be read: {problem}", hint="give a folder that qconvert wrote, or convert again"
    )


def read_written(folder: Path) -> WriteResult:
    """Return what the write stage left in a folder, from its files."""
    manifest = read_manifest(folder)
    layers = tuple(LayerReport.model_validate(layer) for layer in manifest["layers"])
    assignment = Assignment(**manifest["assignment"]) if "assignment" in manifest else None
    activations = ActivationRanges.from_document(manifest["activations"]) if "activations" in manifest else None
    return WriteResult(read_index(folder), layers, assignment, activations)


def read_tensor(folder: Path, tensor: StoredTensor) -> Tensor:
    """Return a copy of one stored tensor. Raises InputError QC-READ-002 where the file ends too early."""
    path = folder / tensor.file
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    # A fresh buffer: tensors lie at any offset, and torch wants them aligned.
    buffer = bytearray(tensor.nbytes)
    with _reading(path), path.open("rb") as file:
        file.seek(tensor.offset)
        count = file.readinto(buffer)
    if count != tensor.nbytes:
        raise _cut_off(path, tensor, count)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # an empty file can't be mapped
        raise InputError("QC-READ-001", f"{path} can't be read: {error}", hint="convert again") from error


def _cut_off(path: Path, tensor: StoredTensor, count: int) -> InputError:
    return InputError(
        "QC-READ-002",
        f"{path} is cut off: a tensor of {tensor.nbytes} bytes at {tensor.offset}, but {count} bytes are there",
        hint="copy the folder again, or convert again",
    )


def map_tensor(folder: Path, tensor: StoredTensor) -> Tensor:
    """Return a view of one stored tensor, of which no byte is read before it is used; never to be written to.

    Raises InputError QC-READ-001 where the file can't be read, QC-READ-002 where it ends too early.
    """
    path = folder / tensor.file
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    with _reading(path):
        mapped = map_file(path)
    if tensor.offset + tensor.nbytes > len(mapped):
        raise _cut_off(path, tensor, max(len(mapped) - tensor.offset, 0))
    return mapped_tensor(mapped, tensor.offset, tensor.dtype, tensor.shape)


def read_layer(
    folder: Path, plan: LayerPlan, tensors: Mapping[str, StoredTensor], rows: slice | Tensor = layout.ALL
) -> QuantizedTensor:
    """Return the quantized tensor of a layer, or of some of its output channels, with outliers and smoothing scale from the
    sidecar.

    tensors: `read_index` of a finished folder, or what a stage has journalled so far.
    Raises InputError QC-READ-003 if one of its tensors is missing.
    """

    def read(suffix: str) -> Tensor:
        name = f"{plan.name}.{suffix}"
        if name not in tensors:
            raise InputError(
                "QC-READ-003", f"{folder} holds no tensor {name!a}", hint="convert again: the folder is not complete"
            )
        return map_tensor(folder, tensors[name])

    tensor = layout.decode(plan, {suffix: read(suffix) for suffix in plan.disk_tensors}, rows)
    outliers = smoothing_scale = None
    if f"{plan.name}.outlier_columns" in tensors:
        outliers = Outliers(read("outlier_columns"), read("outlier_weight").T[rows].float())
    if f"{plan.name}.input_factor" in tensors:
        smoothing_scale = 1 / read("input_factor")
    return dataclasses.replace(tensor, smoothing_scale=smoothing_scale, outliers=outliers)
