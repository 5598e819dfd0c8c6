"""The importance of the tokens of a batch: which of them count, and how much."""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.ir.batch import Batch


def importance_of(output: Tensor) -> Tensor:
    """Return 1 / mean square of a block's output [..., hidden] at each of its rows; bounded where that is next to nothing."""
    square = output.float().square().mean(-1)
    return torch.maximum(square, square.mean() * 1e-3).reciprocal() if square.any() else torch.ones_like(square)


def padding_mask(batch: Batch) -> Tensor | None:
    """Return a mask [rows, tokens] that is False at padding; None where nothing is padded."""
    mask = batch.get("attention_mask")
    return None if mask is None or mask.all() else mask.bool()
