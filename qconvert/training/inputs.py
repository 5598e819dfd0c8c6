"""The fake quantization of what layers read."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qconvert.ir.activation_codes import ActivationCodes
from qconvert.ir.activations import RowCodes
from qconvert.ir.scheme import Activations
from qconvert.training.fake_quantize import StoredStep, StraightThrough, fake_quantize

# Share of a new batch in the range, as in the moving average of torch.ao's observer.
MOMENTUM = 0.01


class StaticInput(nn.Module):
    """Gives what the codes of a value in a static range stand for. Layers that read the same value share one.

    In training mode the range follows the batches by a moving average (B. Jacob et al., 2018, section 3.1), the first of which
    sets it; in eval mode it stays. With learned step sizes the first batch alone sets range and zero point, and `scale` is a
    parameter from then on.
    """

    minimum: Tensor
    maximum: Tensor

    def __init__(self, how: Activations, *, learned: bool) -> None:
        super().__init__()
        self.how, self.learned = how, learned
        self.register_buffer("minimum", torch.tensor(math.inf))
        self.register_buffer("maximum", torch.tensor(-math.inf))
        self.scale = nn.Parameter(torch.tensor(1.0)) if learned else None

    @property
    def was_seen(self) -> bool:
        """Whether any batch has set the range."""
        return bool(self.minimum <= self.maximum)

    def forward(self, x: Tensor) -> Tensor:
        """Return the dequantized codes in the dtype of x; x where no batch has been seen in training mode yet."""
        if self.training and not (self.learned and self.was_seen):
            self._see(x.detach())
        if not self.was_seen:
            return x
        codes = self._range_codes()
        if self.scale is None:
            scale = torch.tensor(codes.scale, device=x.device)
        else:
            factor = 1 / math.sqrt(max(1, x[0].numel()) * max(1, self.how.codes - 1 - codes.zero_point))
            scale = StoredStep.apply(self.scale, None, factor)  # type: ignore[no-untyped-call]
        zero_point = torch.tensor(float(codes.zero_point), device=x.device)
        return fake_quantize(x.float(), scale, zero_point, 0, self.how.codes - 1).to(x.dtype)

    @property
    def codes(self) -> ActivationCodes:
        """The codes that a forward computes with."""
        codes = self._range_codes()
        if self.scale is None:
            return codes
        scale = StoredStep.apply(self.scale.detach(), None, 1.0)  # type: ignore[no-untyped-call]
        return ActivationCodes(float(scale), codes.zero_point, codes.bits)

    def _range_codes(self) -> ActivationCodes:
        return ActivationCodes.of(min(float(self.minimum), 0.0), max(float(self.maximum), 0.0), self.how)

    def _see(self, x: Tensor) -> None:
        smallest, largest = x.float().aminmax()
        if not self.was_seen:
            self.minimum.copy_(smallest)
            self.maximum.copy_(largest)
            if self.scale is not None:
                self.scale.data.fill_(self._range_codes().scale)
        else:
            self.minimum.lerp_(smallest, MOMENTUM)
            self.maximum.lerp_(largest, MOMENTUM)


class RowInput(nn.Module):
    """Gives what the int8 codes of rows stand for, each row with a step of its own (dynamic activations)."""

    def __init__(self, rows: RowCodes) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """Return the dequantized codes of x [..., in] in its dtype; gradients pass straight through."""
        return StraightThrough.apply(x, self._rounded(x.detach().float()))  # type: ignore[no-any-return, no-untyped-call]

    def _rounded(self, x: Tensor) -> Tensor:
        step = self.rows.step_of(x)
        codes = (torch.round(x / step) + self.rows.zero_point).clamp(0, 255)
        return ((codes - self.rows.zero_point) * step).nan_to_num(0.0)  # 0 / 0 in a row of zeros
