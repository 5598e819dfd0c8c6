"""The result of the write stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qconvert.ir.activation_ranges import ActivationRanges
from qconvert.ir.artifact import StoredTensor
from qconvert.ir.decision import Assignment
from qconvert.ir.report import LayerReport


@dataclass(frozen=True, slots=True)
class WriteResult:
    """The result of the write stage.

    tensors: name -> place, model.safetensors ("P.weight_packed", ...) and sidecar ("P.kernel_scale", ...) together.
    layers: what each quantized layer lost and weighs, in the model's order.
    assignment: where a budget has decided their schemes.
    activations: the ranges of static activations; None where there are none, or calibration has not come to them yet.
    """

    tensors: Mapping[str, StoredTensor]
    layers: tuple[LayerReport, ...]
    assignment: Assignment | None = None
    activations: ActivationRanges | None = None
