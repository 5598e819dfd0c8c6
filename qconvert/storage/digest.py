"""sha256 of files, and the bytes of tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

# Bytes hashed at once. A thread that hashes waits up to 5 ms (sys.getswitchinterval) for the interpreter after each.
CHUNK = 2**24


def sha256(content: Path | bytes) -> str:
    """Return the hex digest of a file, or of bytes. Raises OSError for a file that can't be read."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256()
    with content.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order, little-endian; no copy where it is contiguous already."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return flat.numpy().data
