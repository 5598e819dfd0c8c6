"""Outputs with NaN or infinity: the artifact's, which has failed then, and the float model's, which nothing can be compared
with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.ir.batch import Batch
from qconvert.ir.finite import all_finite, not_finite


def first_not_finite(output: Tensor, batch: Batch) -> int | None:
    """Return the first row of an output [rows, ...] that holds NaN or infinity, except where tokens of `batch` are padding."""
    if all_finite(output):
        return None
    wrong = ~torch.isfinite(output)
    if "attention_mask" in batch and output.ndim == 3:  # [rows, tokens, values]
        wrong &= batch["attention_mask"][..., None].bool()
    rows = wrong.reshape(len(wrong), -1).any(1).nonzero()
    return int(rows[0]) if len(rows) else None


def require_finite_float(output: Tensor, batch: Batch, data: str, before: int = 0) -> None:
    """Raise InputError QC-FLOAT-001 where an output of the float model is not finite.

    data: what the rows of `batch` are samples of. before: samples that came before them.
    """
    row = first_not_finite(output, batch)
    if row is not None:
        raise not_finite(f"comes out of the float model for {data} sample {before + row + 1}")
