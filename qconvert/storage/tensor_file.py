"""Tensors in files: mapped, so that their pages are not memory that the system has to find, and gone when the tensor is."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from qconvert.storage.disk import disk_errors


def tensor_in_file(folder: Path, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return zeros in a file of `folder` whose name is gone already, and whose space is when the tensor is.

    Where the system can't reserve the space of a file, they are in memory.

    Raises ResourceError QC-DISK-002 if the disk is full, QC-DISK-003 where it can't be written.
    """
    if sys.platform != "linux":
        return torch.zeros(shape, dtype=dtype)
    with disk_errors(folder), tempfile.NamedTemporaryFile(dir=folder, prefix="tensor-") as file:
        # Before it is written to: a page that finds no space then kills the process.
        os.posix_fallocate(file.fileno(), 0, dtype.itemsize * shape.numel())
        return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=dtype).reshape(shape)
