"""Tensors that may be too large for memory: the statistics of wide layers, and the hidden states of many samples.

What is large is made where `large_tensors_made_by` says, such as in files (storage/tensor_file.py). To whoever computes with
it, it is a tensor like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# Bytes above which a tensor, or several that are held together, are large. The Gram matrix of an input of 28672 has 3.3 GB.
LARGE = 1_000_000_000

# Makes zeros of a shape and a type, on the CPU.
MakeZeros = Callable[[torch.Size, torch.dtype], Tensor]

_maker: ContextVar[MakeZeros | None] = ContextVar("maker", default=None)


@contextmanager
def large_tensors_made_by(maker: MakeZeros) -> Iterator[None]:
    """Let large tensors be made by `maker` within the context; without one, they are in memory."""
    before = _maker.set(maker)
    try:
        yield
    finally:
        _maker.reset(before)


def zeros(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    """Return float32 zeros, and raise what the maker of large tensors raises."""
    make = _maker_for(torch.float32.itemsize * torch.Size(shape).numel(), torch.device(device))
    return make(torch.Size(shape), torch.float32) if make else torch.zeros(shape, device=device)


def copied(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, and raise what the maker of large tensors raises."""
    make = _maker_for(tensor.nbytes, tensor.device)
    return make(tensor.shape, tensor.dtype).copy_(tensor) if make else tensor.clone()


def kept(tensor: Tensor, together: int) -> Tensor:
    """Return a tensor for keeping: itself, or if so many like it are large together, a copy that the maker of large tensors has
    made room for. Raises what that raises.
    """
    make = _maker_for(together * tensor.nbytes, tensor.device)
    return make(tensor.shape, tensor.dtype).copy_(tensor) if make else tensor


def _maker_for(nbytes: int, device: torch.device) -> MakeZeros | None:
    return _maker.get() if nbytes > LARGE and device.type == "cpu" else None
