"""SignRound: move the scales and the roundings of one block until its output is closest to the float block's.

    w^ = (q - z) s',   q = clamp(round(w / s' + z + v)),   s' = s a

v [out, in] in [-1/2, 1/2] shifts what is rounded, a [out, groups] widens or clips the range; both follow the sign of the
gradient of the block's squared output error, round() passing gradients through. w is what the quantizer's own codes stand for,
so tuning starts where it ended. Some batches are held out: what does not help on them is not kept.

Source: W. Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (SignRound).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.layer import Layer
from qconvert.ir.quantized import QuantizedTensor
from qconvert.plugin import hookimpl
from qconvert.plugin.tuner import BlockTuner, Forward, SampledBlock

HELD_OUT = 8  # one batch in so many judges
PATIENCE = 2  # judgements without a gain that end the tuning
JUDGE_EVERY = 5  # steps between two judgements
SCALE_STEP = 0.1  # how far a scale moves where a rounding moves by one


@hookimpl
def register_tuners() -> list[type[BlockTuner]]:
    """Register the tuner of this module."""
    return [SignRound]


@dataclass(frozen=True)
class SignRound(BlockTuner):
    """Signed gradient descent on roundings and scales, judged on samples that are held out.

    steps: how many of them, at most.
    seconds: time for each block, at most; what is reached in it depends on the machine.
    """

    steps: int = 20
    seconds: float | None = None

    name = "signround"

    def tune(
        self,
        layers: Mapping[str, Layer],
        tensors: Mapping[str, QuantizedTensor],
        samples: SampledBlock,
        fixed: Mapping[str, Tensor],
    ) -> dict[str, QuantizedTensor]:
        """`tensors` with tuned codes and scales, or as they were where nothing helped on the batches that are held out.

        Int8 activations are computed in float here.
        """
        variables = {name: _Variables(layers[name].weight, tensor) for name, tensor in tensors.items()}
        count = len(samples.targets)
        judges = range(count - max(1, count // HELD_OUT), count)
        teachers = range(judges.start) or judges  # a single batch has to do both
        deadline = time.monotonic() + self.seconds if self.seconds else None
        with samples.running(fixed) as forward:
            least = _loss(forward, tensors, samples, judges)
            best, gainless = dict(tensors), 0
            for step in range(self.steps):
                batch = teachers[step % len(teachers)]
                output = forward(batch, {name: each.weight() for name, each in variables.items()})
                torch.autograd.backward(_error(output, samples, batch))
                rate = (1 - step / self.steps) / self.steps
                for each in variables.values():
                    each.move(rate)
                late = deadline is not None and time.monotonic() > deadline
                if late or (step + 1) % JUDGE_EVERY == 0 or step + 1 == self.steps:
                    found = {name: each.tensor() for name, each in variables.items()}
                    loss = _loss(forward, found, samples, judges)
                    gainless = 0 if loss < least else gainless + 1
                    if loss < least:
                        least, best = loss, found
                    if late or gainless == PATIENCE:
                        break
        return best


class _Variables:
    """The scales and roundings of one layer, which are tuned."""

    def __init__(self, weight: Tensor, tensor: QuantizedTensor) -> None:
        self.start = tensor
        scheme = tensor.scheme
        self.zero_point = 0 if tensor.zero_point is None else tensor.zero_point.unsqueeze(-1).float()
        scale = tensor.scale.unsqueeze(-1)
        codes = affine.grouped(tensor.q, scheme).float()
        # Half a step from a code is as far as the weight may be: beyond, the quantizer wanted another code than the nearest.
        shift = (affine.grouped(weight, scheme) / scale + self.zero_point - codes).clamp_(-0.499, 0.499)
        self.weights = (codes + shift - self.zero_point) * scale  # [out, groups, group size]
        self.rounding = torch.zeros_like(self.weights, requires_grad=True)
        self.range = torch.ones_like(tensor.scale, requires_grad=True)

    def _codes(self, scale: Tensor) -> Tensor:
        low, high = self.start.scheme.code_range
        exact = self.weights / scale.unsqueeze(-1) + self.zero_point + self.rounding
        return (exact + (exact.detach().round() - exact.detach())).clamp(low, high)

    def _scale(self) -> Tensor:
        scale = self.start.scale * self.range
        return scale + (affine.round_scale(scale.detach(), self.start.scheme) - scale.detach())

    def weight(self) -> Tensor:
        """The dequantized weight [out, in] that gradients flow to."""
        scale = self._scale()
        weight = ((self._codes(scale) - self.zero_point) * scale.unsqueeze(-1)).reshape(self.start.q.shape)
        if self.start.outliers is not None:
            weight = weight.index_copy(1, self.start.outliers.columns, self.start.outliers.weight)
        return weight if self.start.smoothing_scale is None else weight / self.start.smoothing_scale

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """Step against the sign of the gradients; a layer that the batch did not reach stays."""
        if self.rounding.grad is None or self.range.grad is None:
            return
        self.rounding.sub_(self.rounding.grad.sign(), alpha=rate).clamp_(-0.5, 0.5)
        self.range.sub_(self.range.grad.sign(), alpha=rate * SCALE_STEP)
        self.rounding.grad = self.range.grad = None

    @torch.no_grad()
    def tensor(self) -> QuantizedTensor:
        scale = affine.round_scale(self.start.scale * self.range, self.start.scheme)
        return dataclasses.replace(self.start, q=self._codes(scale).reshape(self.start.q.shape).to(torch.int8), scale=scale)


def _error(output: Tensor, samples: SampledBlock, batch: int) -> Tensor:
    """Squared error relative to the output, mean over all tokens."""
    square = (output - samples.targets[batch]).square().mean(-1)
    return (square * samples.importance[batch]).mean()


@torch.no_grad()
def _loss(forward: Forward, tensors: Mapping[str, QuantizedTensor], samples: SampledBlock, batches: Sequence[int]) -> float:
    weights = {name: tensor.dequantize() for name, tensor in tensors.items()}
    return sum(float(_error(forward(batch, weights), samples, batch)) for batch in batches)
