"""Batch: inputs of a model, several samples at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Input name -> [rows, ...].
Batch = dict[str, Any]


def row_count(inputs: Mapping[str, Tensor]) -> int:
    """Return how many rows inputs have: an input that all rows of a module share has one row, or is a scalar."""
    return max(len(value) for value in inputs.values() if value.ndim)
