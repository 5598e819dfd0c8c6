"""The files of weights of an output folder: model.safetensors, or shards of it with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from qconvert.ir.artifact import WEIGHTS_INDEX, StoredTensor, weight_file_names
from qconvert.ir.model import TensorInfo
from qconvert.storage.disk import disk_errors
from qconvert.storage.safetensors import SafetensorsFile


class WeightFiles:
    """The files of weights in `folder`, written tensor by tensor.

    contents: what will be appended to each, in the dtypes that take most space.
    tensors: what an earlier run has appended to them, and may have written elsewhere.
    """

    def __init__(self, folder: Path, contents: Sequence[Mapping[str, TensorInfo]], tensors: Mapping[str, StoredTensor]) -> None:
        self.folder = folder
        self._file_of: dict[str, SafetensorsFile] = {}
        self._files: list[SafetensorsFile] = []
        for name, largest in zip(weight_file_names(len(contents)), contents, strict=True):
            file = SafetensorsFile(folder / name, largest, _of(name, tensors))
            self._files.append(file)
            self._file_of |= dict.fromkeys(largest, file)

    def append(self, name: str, tensor: Tensor) -> StoredTensor:
        """Write a tensor behind the last one of its file. Raises ResourceError QC-DISK-002 on a full disk."""
        return self._file_of[name].append(tensor)

    def sync(self) -> None:
        """Put all that was written on disk. Raises ResourceError (disk)."""
        for file in self._files:
            file.sync()

    def finish(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Write the headers, and an index where there are several files. tensors: of these files all, and others."""
        for file in self._files:
            file.finish(_of(file.path.name, tensors))
        if len(self._files) > 1:
            self._write_index({name: tensors[name] for name in self._file_of})

    def close(self) -> None:
        """Close the files, which need not be complete. Raises ResourceError (disk)."""
        for file in self._files:
            file.close()

    def _write_index(self, tensors: Mapping[str, StoredTensor]) -> None:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: tensor.file for name, tensor in tensors.items()},
        }
        path = self.folder / WEIGHTS_INDEX
        with disk_errors(path):
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _of(file: str, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.file == file}
