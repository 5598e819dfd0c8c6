"""A safetensors file that is written tensor by tensor, with its header put in place last.

Why last: whether a scale is float16 or float32 is known only when it has been computed. The space is reserved from
the plan; the header may be padded with spaces (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qconvert.ir.artifact import WEIGHTS, StoredTensor
from qconvert.ir.model import TensorInfo
from qconvert.storage.output import disk_errors, fsync
from qconvert.storage.reader import DTYPE_NAMES, tensor_bytes

# One key at most: with more, safetensors 0.8 writes them in random order, so nobody could compare files.
METADATA = {"format": "pt"}


class SafetensorsFile:
    """model.safetensors in `folder`.

    largest: what will be appended, in the dtypes that take most space.
    tensors: what an earlier run has appended; the next tensor goes behind it.
    """

    def __init__(self, folder: Path, largest: Mapping[str, TensorInfo], tensors: Mapping[str, StoredTensor]) -> None:
        self.path = folder / WEIGHTS
        total = sum(info.nbytes for info in largest.values())
        widest = _header({name: (info.dtype, info.shape, total, total) for name, info in largest.items()})
        self.begin = 8 + len(widest) + -len(widest) % 8  # the data begins at a multiple of 8
        self.end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=self.begin)
        with disk_errors(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            self.file = os.fdopen(descriptor, "r+b")
            _allocate(descriptor, self.begin + total)
            self.file.seek(self.end)

    def append(self, tensor: Tensor) -> StoredTensor:
        """Write a tensor behind the last one. Raises ResourceError QC-DISK-002 on a full disk."""
        data = tensor_bytes(tensor)
        stored = StoredTensor(WEIGHTS, tensor.dtype, tuple(tensor.shape), self.end, data.nbytes)
        with disk_errors(self.path):
            self.file.write(data)
        self.end += data.nbytes
        return stored

    def sync(self) -> None:
        with disk_errors(self.path):
            self.file.flush()
            fsync(self.path)
            fsync(self.path.parent)

    def finish(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Write the header for `tensors`, all of the file's, and cut off what was reserved but not needed."""
        header = _header(
            {
                name: (tensor.dtype, tensor.shape, tensor.offset - self.begin, tensor.offset - self.begin + tensor.nbytes)
                for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset)
            }
        )
        length = self.begin - 8
        with disk_errors(self.path):
            self.file.seek(0)
            self.file.write(length.to_bytes(8, "little") + header.ljust(length))
            self.file.truncate(self.end)
        self.sync()

    def close(self) -> None:
        with disk_errors(self.path):
            self.file.close()


def _header(entries: Mapping[str, tuple[Any, tuple[int, ...], int, int]]) -> bytes:
    """JSON header from name -> (dtype, shape, first byte, last byte + 1)."""
    header: dict[str, Any] = {"__metadata__": METADATA}
    for name, (dtype, shape, begin, end) in entries.items():
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    return json.dumps(header, separators=(",", ":")).encode()


def _allocate(descriptor: int, size: int) -> None:
    """Take the disk space now, so that a full disk is known before the work is done. Some file systems can't."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
