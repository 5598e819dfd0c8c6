"""qconvert.bin: what graphs need beside model.safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qconvert.ir.artifact import SIDECAR, StoredTensor
from qconvert.storage.digest import tensor_bytes
from qconvert.storage.disk import disk_errors, fsync

# CPU kernels like tensors that begin on a cache line.
SIDECAR_ALIGNMENT = 64


class Sidecar:
    """qconvert.bin: tensors one after the other, each at a multiple of 64 bytes. Without a tensor there is no file.

    tensors: name -> place, of all that was appended and of what a resumed run starts from.
    """

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.tensors = dict(tensors)
        self._end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=0)
        if not tensors:
            path.unlink(missing_ok=True)
        else:
            os.truncate(path, self._end)  # what a killed run wrote but did not journal

    def append(self, name: str, tensor: Tensor) -> StoredTensor:
        """Write `tensor` under a new name. Raises ResourceError QC-DISK-002 on a full disk."""
        if name in self.tensors:
            raise ValueError(f"the sidecar already holds {name!a}")
        data = tensor_bytes(tensor)
        offset = -(-self._end // SIDECAR_ALIGNMENT) * SIDECAR_ALIGNMENT
        with disk_errors(self.path), self.path.open("ab") as file:
            file.write(b"\0" * (offset - self._end))
            file.write(data)
        self._end = offset + data.nbytes
        self.tensors[name] = StoredTensor(SIDECAR, tensor.dtype, tuple(tensor.shape), offset, data.nbytes)
        return self.tensors[name]

    def sync(self) -> None:
        """Put all that was written on disk. Raises ResourceError (disk)."""
        if self.tensors:
            with disk_errors(self.path):
                fsync(self.path)
