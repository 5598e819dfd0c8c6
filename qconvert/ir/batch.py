"""Batch: inputs of a model, several samples at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Input name -> [rows, ...].
Batch = dict[str, Any]


def row_count(inputs: Mapping[str, Tensor]) -> int:
    """How many rows inputs have; what all rows of a module's share has one, or is a scalar."""
    return max(len(value) for value in inputs.values() if value.ndim)
