"""The input of a quantizer: layers, groups of linears that share an input, and calibration statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from qconvert.errors import UsageError
from qconvert.ir.lane import Lane

LayerKind = Literal["linear", "conv1d", "conv2d", "embedding"]


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationStats:
    """The statistics of one layer's input, as the observers of a quantizer saw it.

    rows: how many input rows (tokens, pixels) were seen, padding left out.
    values: observer name -> statistic, e.g. {"absmax": [in], "gram": [in, in]}.
    made_by: ONNX type of the node that gives the input, e.g. "Gelu"; None where it is not known, or the input is scaled.
    """

    rows: int
    values: Mapping[str, Tensor]
    made_by: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One linear, convolution or embedding.

    name: full module name, "model.layers.0.self_attn.q_proj".
    kind: "linear", "conv1d" (GPT-2's transposed linear), "conv2d" or "embedding".
    weight: [out, in] whatever the kind: Conv1D transposed, kernels flattened to [out, in/groups * kh * kw], embeddings
        [vocabulary, width]. float32 and contiguous for quantizers; in a Block as the source holds it, a view of mapped memory.
    bias: [out] or None, of the weight's type.
    stats: None where the quantizer has no observers, and for embeddings.
    """

    name: str
    kind: LayerKind
    weight: Tensor
    bias: Tensor | None = None
    stats: CalibrationStats | None = None

    def in_float(self) -> Layer:
        """Return the layer as quantizers are given it: float32, in memory of its own."""
        return replace(self, weight=_own_float(self.weight), bias=None if self.bias is None else _own_float(self.bias))


@dataclass(frozen=True, slots=True)
class Producer:
    """The module that makes the input of a LinearGroup, where a per-channel scale can be folded into it.

    kind: "norm" (weight and bias are divided) or "linear" (rows of its weight, and its bias, are divided).
    name: module name of the norm or linear.
    channels: for each input channel of the group, the output channel of the producer that it is a copy of;
        None means one to one. Grouped-query attention repeats value heads, so several inputs share a producer row.
    """

    kind: Literal["norm", "linear"]
    name: str
    channels: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LinearGroup:
    """Linears that read the same tensor, e.g. q, k and v.

    producer: None where no scale can be folded.
    stats: statistics of the shared input.
    smoothing_scale: [in] found by a quantizer's `prepare`; weights are multiplied by it, the input divided.
    """

    layers: tuple[Layer, ...]
    producer: Producer | None = None
    stats: CalibrationStats | None = None
    smoothing_scale: Tensor | None = None

    def in_float(self) -> LinearGroup:
        """Return the group as quantizers are given it, its layers in float32."""
        return replace(self, layers=tuple(layer.in_float() for layer in self.layers))


def _own_float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True, eq=False)
class BlockSamples:
    """The samples that a repeated block is tuned on.

    lanes: per batch what the block is called with.
    targets: per batch what the float block puts out, [rows, tokens, hidden].
    importance: per batch how much a squared error counts at each token, [rows, tokens]; 0 at padding.
    """

    lanes: tuple[Lane, ...]
    targets: tuple[Tensor, ...]
    importance: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One unit of the model. Plain data: it can be handed to another process.

    groups: its linears, those with a common input together, in forward order. Their weights are as the source holds them: in
        float32 those of one block may take gigabytes, and so they are put there one layer, or one group, at a time.
    tensors: the tensors that a fold may change (weights and biases of producers), by full name, as the source holds them.
    lane: the calibration inputs on which it is proved that folding changes nothing; None where nothing was calibrated.
    samples: what it is tuned on; None where it is not to be tuned, and outside the repeated blocks.
    """

    name: str
    groups: tuple[LinearGroup, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    lane: Lane | None = None
    samples: BlockSamples | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The linears of all groups."""
        return tuple(layer for group in self.groups for layer in group.layers)

    def require_seen(self) -> None:
        """Raise UsageError QC-CALIB-001 for layers that have statistics, but of no row."""
        names = [layer.name for layer in self.layers if layer.stats is not None and not layer.stats.rows]
        if names:
            raise UsageError(
                "QC-CALIB-001",
                f"no calibration sample reached {', '.join(map(repr, names[:5]))} ({len(names)} layers in all saw 0 rows)",
                hint=f"keep it in float with --rule '{names[0]}=float', or calibrate on more varied data",
            )
