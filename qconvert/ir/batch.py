"""Batch: inputs of a model, several samples at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Input name -> [rows, ...].
Batch = dict[str, Any]

# The most samples of a batch, and the most tokens: enough rows for the matrix kernels, and logits [tokens, 50k] stay at 200 MB.
BATCH_ROWS, BATCH_TOKENS = 8, 1024
# The logits of several windows that are compared at once, of one of two models.
LOGITS_BYTES = 256_000_000


def row_count(inputs: Mapping[str, Tensor]) -> int:
    """Return how many rows inputs have: an input that all rows of a module share has one row, or is a scalar."""
    return max(len(value) for value in inputs.values() if value.ndim)


def rows_of(batch: Batch) -> list[Batch]:
    """Return the rows of a text model's batch, each as a batch of its own."""
    return [{name: value[row : row + 1] for name, value in batch.items()} for row in range(row_count(batch))]


def unpadded(row: Batch) -> Batch:
    """Return one row of inputs without the padding on its right, if it has a mask that tells."""
    mask = row.get("attention_mask")
    if mask is None:
        return row
    length = int(mask.sum())
    return {name: value[:, :length] if value.shape == mask.shape else value for name, value in row.items()}


def windows_at_once(tokens: int, vocabulary: int) -> int:
    """Return how many windows of a model that writes text are run at the same time: as many as have logits of LOGITS_BYTES."""
    return max(1, LOGITS_BYTES // (4 * tokens * vocabulary))
