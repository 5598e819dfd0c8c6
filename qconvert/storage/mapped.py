"""Files that are mapped: no byte of theirs is read before it is used, and the system may take its page back at any time."""

from __future__ import annotations

import math
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

# Linux reserves memory for a private writable mapping unless told not to; the value is not in Python's mmap before 3.13.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0


def map_file(path: Path) -> mmap.mmap:
    """Map the whole file. Pages are private: a tensor that is written to by mistake neither changes the file nor kills the
    process, as read-only pages would."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def mapped_tensor(mapped: mmap.mmap, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return a view of what is mapped; a copy where the tensor is not aligned there, as kernels want it."""
    count = math.prod(shape)
    if offset % dtype.itemsize:
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
        return raw.clone().view(dtype).reshape(shape)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).reshape(shape)
