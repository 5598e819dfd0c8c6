"""What the write stage has written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qconvert.ir.artifact import StoredTensor
from qconvert.ir.decisions import Assignment
from qconvert.ir.report import LayerReport


@dataclass(frozen=True, slots=True)
class WriteResult:
    """The result of the write stage.

    tensors: name -> place, model.safetensors ("P.weight_packed", ...) and sidecar ("P.kernel_scale", ...) together.
    layers: what each quantized layer lost and weighs, in the model's order.
    assignment: where a budget has decided their schemes.
    """

    tensors: Mapping[str, StoredTensor]
    layers: tuple[LayerReport, ...]
    assignment: Assignment | None = None
