"""The Quantizer contract: one algorithm, its options, and what it needs to know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.double_quant import nested
from qconvert.ir.layer import Layer, LinearGroup
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import PerTensor, QuantScheme
from qconvert.plugin.observer import Observer


class Quantizer(ABC):
    """Turns one layer's weight into a QuantizedTensor.

    Subclasses are frozen dataclasses: their fields are the user's options, with types, defaults and docs.
    A quantizer changes none of its inputs and draws no random numbers: the same layer gives the same bytes.

    name: what the user types, kebab-case.
    default_scheme: used where the recipe names none.
    observers: statistics that it needs of each linear's input; () means no calibration data is needed.
    by_rows: whether `quantize` does with each row what it would do if there were no other, outliers included; schemes with one
        scale per tensor aside. The layer that it is given may then be some rows of a large embedding or head.
    codebooks: whether it makes schemes with a codebook (nf4, fp4); who does not is never asked for one.
    expected_failed_checks: name of a check of qconvert.testing -> why this quantizer fails it, for its users to read.
    """

    name: ClassVar[str]
    default_scheme: ClassVar[QuantScheme]
    observers: ClassVar[tuple[type[Observer], ...]] = ()
    by_rows: ClassVar[bool] = False
    codebooks: ClassVar[bool] = False
    expected_failed_checks: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @property
    def has_outliers(self) -> bool:
        """Whether its tensors may keep float columns beside the codes, which transformers must be told about.

        A class attribute does where that is no matter of options.
        """
        return False

    def refuses(self, scheme: QuantScheme) -> str | None:
        """Return why this quantizer can't produce `scheme`, as half a sentence for the user; None if it can."""
        return None

    def prepare(self, group: LinearGroup, schemes: tuple[QuantScheme, ...]) -> LinearGroup:
        """Choose one `smoothing_scale` [in] for linears that share an input, or none; `schemes` are theirs, in order.

        Returns the group with `smoothing_scale` set and layer weights as they were. qconvert folds the scale into the
        producer where that is exact, and then calls `quantize` with the scaled weights and statistics.
        """
        return group

    @abstractmethod
    def quantize(self, layer: Layer, scheme: QuantScheme) -> QuantizedTensor:
        """Quantize `layer.weight` [out, in] to `scheme`."""


def round_to_nearest(weight: Tensor, scheme: QuantScheme, clip: Tensor | float = 1.0) -> QuantizedTensor:
    """Quantize weight [out, in] to the nearest code of a range that covers it, shrunk by `clip`.

    clip: one ratio, or one per group [out, groups]. Double quantization comes last: codes are those of the exact scales.
    """
    if isinstance(scheme.granularity, PerTensor):
        scale, zero_point = affine.choose_qparams(weight, scheme, clip)
        return QuantizedTensor(affine.quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme)
    q = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(scheme.scale_shape(*weight.shape))
    zero_point = None if scheme.symmetric else torch.empty(scale.shape, dtype=torch.int8)
    for rows in affine.row_blocks(*weight.shape):
        ratio = clip[rows] if isinstance(clip, Tensor) else clip
        scale[rows], zero = affine.choose_qparams(weight[rows], scheme, ratio)
        q[rows] = affine.quantize(weight[rows], scale[rows], zero, scheme)
        if zero_point is not None and zero is not None:
            zero_point[rows] = zero
    if scheme.double_quant:
        stored = nested(scale)
        return QuantizedTensor(q, stored.dequantize(), zero_point, scheme, nested_scale=stored)
    return QuantizedTensor(q, scale, zero_point, scheme)
