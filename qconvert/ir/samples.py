"""Samples: the data that a run calibrates on and the data that it is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qconvert.ir.batch import Batch


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Two disjoint sets of model inputs: no evaluation sample has been calibrated on.

    A batch maps input names to tensors with the samples as first axis. Text models: input_ids and attention_mask,
    [rows, tokens] int64, padded on the right. A "module": what its forward takes, and what all samples share as it is.

    calibration: () where the quantizer needs none.
    files: "calibration", "evaluation" -> the file that they were drawn from, where it was one.
    """

    calibration: tuple[Batch, ...]
    evaluation: tuple[Batch, ...]
    files: Mapping[str, Path] = field(default_factory=dict)
