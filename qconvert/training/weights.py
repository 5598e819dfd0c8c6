"""The fake quantization of one weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qconvert.ir import affine
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.training.fake_quantize import StoredStep, StraightThrough, fake_quantize


class WeightQuantizer(nn.Module):
    """Gives what the codes of a weight [out, in] stand for.

    Its range covers the weight as it is at each forward (as the quantizer per-channel's does), unless step sizes are learned:
    then `scale` [out, groups] is a parameter, and the zero point stays. Codebooks have no steps to learn.
    """

    def __init__(self, scheme: QuantScheme, weight: Tensor, *, learned: bool) -> None:
        """weight: as it is when training begins; it sets the first step sizes."""
        super().__init__()
        self.scheme = scheme
        self.scale: nn.Parameter | None = None
        self.zero_point: Tensor | None
        self.register_buffer("zero_point", None)
        if learned and scheme.codebook is None:
            scale, self.zero_point = affine.choose_qparams(weight.detach().float(), scheme)
            self.scale = nn.Parameter(self._first_steps(weight.detach().float(), scale))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the dequantized codes, [out, in] in the dtype of the weight; gradients pass straight through."""
        if self.scale is None:
            return StraightThrough.apply(weight, self.quantized(weight).dequantize())  # type: ignore[no-any-return, no-untyped-call]
        none = torch.zeros((), device=weight.device)
        zero_point = none if self.zero_point is None else self.zero_point.unsqueeze(-1).float()
        groups = affine.grouped(weight.float(), self.scheme)
        rounded = fake_quantize(groups, self._stored_scale(weight).unsqueeze(-1), zero_point, *self.scheme.code_range)
        return rounded.reshape(weight.shape).to(weight.dtype)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes that a forward on this weight [out, in] computes with."""
        if self.scale is not None:
            return self._coded(weight.float(), self._stored_scale(weight), self.zero_point)
        weight = weight.float()  # looked at each time: what changes a weight through .data (peft's merging) leaves no trace
        return self._coded(weight, *affine.choose_qparams(weight, self.scheme))

    def _coded(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> QuantizedTensor:
        return QuantizedTensor(affine.quantize(weight, scale, zero_point, self.scheme), scale, zero_point, self.scheme)

    def _stored_scale(self, weight: Tensor) -> Tensor:
        """The step sizes as they are stored; their gradient is of the size of the weights' (LSQ, section 2.2)."""
        per_step = weight.numel() // self.scale.numel() if self.scale is not None else 1
        factor = 1 / math.sqrt(per_step * self.scheme.code_range[1])
        return StoredStep.apply(self.scale, self.scheme, factor)  # type: ignore[no-any-return, no-untyped-call]

    def _first_steps(self, weight: Tensor, covering: Tensor) -> Tensor:
        """2 <|w|> / sqrt(largest code), LSQ's, with the sign of the step that covers the range; of a zero point, that step."""
        if not self.scheme.symmetric:
            return covering
        mean = affine.grouped(weight, self.scheme).abs().mean(-1)
        steps = 2 * mean / math.sqrt(self.scheme.code_range[1])
        return torch.where(mean > 0, torch.minimum(steps, covering.abs()), covering.abs()) * covering.sign()
