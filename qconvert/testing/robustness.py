"""Checks with weights and inputs that real models hold, and that formulas forget.

A weight survives if its result is finite and no error is larger than that of half a step in every place, see
`require_covering_error`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qconvert.ir import affine, nearest_value
from qconvert.ir.layer import LayerKind
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.quantizer import Quantizer
from qconvert.testing.failure import CheckFailure
from qconvert.testing.samples import Outcome, Sample, every_outcome, normal, with_weight

OUT, WIDTH = 6, 64


def half_steps(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """Return the largest error of rounding weight [out, in] in a range that covers it (affine.choose_qparams): half the largest
    step, 0 in groups of zeros; [out, in] float64. What float32 can't divide by counts as the smallest number that it can.
    """
    scale, _ = affine.choose_qparams(weight, scheme)
    groups = affine.grouped(weight, scheme)
    step = scale.double().abs().clamp(min=nearest_value.SMALLEST) * scheme.format.largest_step
    half = torch.where((groups != 0).any(-1), step / 2, 0.0)
    return half.unsqueeze(-1).expand(groups.shape).reshape(weight.shape)


def require_covering_error(outcome: Outcome) -> None:
    """Raise CheckFailure unless the result is finite, its root mean square error at most that of half a step in every place.

    With statistics it is the error of the output that counts, as quantizers may trade errors of weights for it; errors of half
    a step that have nothing to do with each other would add up to sum_j E[x_j^2] (step_j / 2)^2. Without, it is that of the
    weights. Rounding to nearest is off by step / sqrt(12) on average, so there is a factor of 1.7 for those that clip.
    """
    tensor, weight = outcome.tensor, outcome.layer.weight
    dequantized = affine.dequantize(tensor.q, tensor.scale, tensor.zero_point, tensor.scheme)
    lost = int((~torch.isfinite(dequantized)).sum())
    if lost:
        raise CheckFailure(f"{outcome.place}: {lost} of {weight.numel()} weights are not finite after dequantization")
    error, half = dequantized.double() - weight.double(), half_steps(weight, tensor.scheme)
    if outcome.layer.stats is None:
        what, found, allowed = "weights", error.square().mean(), half.square().mean()
    else:
        rows = outcome.rows.double()
        what, found = "output", (rows @ error.T).square().mean()
        allowed = (rows.square().mean(0) @ half.square().T).mean()
    if found > allowed:
        raise CheckFailure(
            f"{outcome.place}: root mean square error of the {what} {math.sqrt(found):.3g}, "
            f"at most {math.sqrt(allowed):.3g} (half a step) is allowed"
        )


def check_zero_weight(quantizer: Quantizer) -> None:
    """A weight of zeros comes back as zeros."""
    for outcome in every_outcome(quantizer, with_weight("zero", torch.zeros(OUT, WIDTH))):
        _require_zeros(outcome, slice(None))


def check_zero_row(quantizer: Quantizer) -> None:
    """An output channel of zeros, as pruning leaves them, comes back as zeros beside others that do not."""
    weight = normal(OUT, WIDTH, seed=20)
    weight[2] = 0
    for outcome in every_outcome(quantizer, with_weight("zero-row", weight)):
        _require_zeros(outcome, slice(2, 3))
        require_covering_error(outcome)


def check_zero_group(quantizer: Quantizer) -> None:
    """32 inputs whose weights are all zero have no range of their own."""
    weight = normal(OUT, WIDTH, seed=21)
    weight[:, :32] = 0
    _require_survival(quantizer, with_weight("zero-group", weight))


def check_constant_weight(quantizer: Quantizer) -> None:
    """A weight of one number has no range either."""
    _require_survival(quantizer, with_weight("constant", torch.full((OUT, WIDTH), -0.7)))


def check_one_signed_weight(quantizer: Quantizer) -> None:
    """Weights far on one side of zero, whose range is to hold zero all the same."""
    _require_survival(quantizer, with_weight("one-signed", normal(OUT, WIDTH, seed=22) * 0.01 + 5))


def check_single_row(quantizer: Quantizer) -> None:
    """A linear of one output."""
    _require_survival(quantizer, with_weight("single-row", normal(1, WIDTH, seed=23)))


def check_single_column(quantizer: Quantizer) -> None:
    """A linear of one input, where the scheme has no groups."""
    _require_survival(quantizer, with_weight("single-column", normal(OUT, 1, seed=24)))


def check_ragged_width(quantizer: Quantizer) -> None:
    """Shapes that no block divides, where the scheme has no groups."""
    _require_survival(quantizer, with_weight("ragged", normal(7, 37, seed=25)))


def check_subnormal_weight(quantizer: Quantizer) -> None:
    """Weights whose scale float32 can't divide by."""
    _require_survival(quantizer, with_weight("subnormal", normal(OUT, WIDTH, seed=26) * 1e-42))


def check_tiny_weight(quantizer: Quantizer) -> None:
    """Weights whose scale float16 can't hold."""
    _require_survival(quantizer, with_weight("tiny", normal(OUT, WIDTH, seed=27) * 1e-12))


def check_huge_weight(quantizer: Quantizer) -> None:
    """Weights near the end of float32: their squares and their range overflow it."""
    _require_survival(quantizer, with_weight("huge", normal(OUT, WIDTH, seed=28).clamp(-3, 3) * 1e38))


def check_one_huge_weight(quantizer: Quantizer) -> None:
    """One weight 10,000 times as large as the others."""
    weight = normal(OUT, WIDTH, seed=29)
    weight[1, 7] = 1e4
    _require_survival(quantizer, with_weight("one-huge", weight))


def check_strided_weight(quantizer: Quantizer) -> None:
    """A transposed view is a weight like any other: reshapes that need contiguous memory fail on it."""
    _require_survival(quantizer, with_weight("strided", normal(WIDTH, OUT, seed=30).T))


def check_every_kind_of_layer(quantizer: Quantizer) -> None:
    """Conv1D and Conv2d come as [out, in] like linears; so do embeddings, without statistics, if no observer is declared."""
    kinds: tuple[LayerKind, ...] = ("conv1d", "conv2d") if quantizer.observers else ("conv1d", "conv2d", "embedding")
    for kind in kinds:
        _require_survival(quantizer, with_weight(kind, normal(OUT, WIDTH, seed=31), kind))


def check_zero_inputs(quantizer: Quantizer) -> None:
    """Calibration inputs that were all zero, behind a dead ReLU, say nothing of what matters."""
    _require_survival(quantizer, Sample("zero-inputs", (normal(OUT, WIDTH, seed=32),), torch.zeros(8, WIDTH)))


def check_dead_inputs(quantizer: Quantizer) -> None:
    """Every third input column was always zero."""
    rows = normal(96, WIDTH, seed=33)
    rows[:, ::3] = 0
    _require_survival(quantizer, Sample("dead-inputs", (normal(OUT, WIDTH, seed=34),), rows))


def check_single_input(quantizer: Quantizer) -> None:
    """One calibration row: its Gram matrix has rank 1."""
    # One number per output is all that there is to measure: 24 of them, so that chance does not decide.
    _require_survival(quantizer, Sample("single-input", (normal(24, WIDTH, seed=35),), normal(1, WIDTH, seed=36)))


def check_huge_inputs(quantizer: Quantizer) -> None:
    """Massive activations, 10,000 times as large as others, in one column."""
    rows = normal(96, WIDTH, seed=37)
    rows[:, 11] *= 1e4
    _require_survival(quantizer, Sample("huge-inputs", (normal(OUT, WIDTH, seed=38),), rows))


def _require_survival(quantizer: Quantizer, sample: Sample) -> None:
    for outcome in every_outcome(quantizer, sample):
        require_covering_error(outcome)


def _require_zeros(outcome: Outcome, rows: slice) -> None:
    part = outcome.tensor.dequantize()[rows]
    wrong = int((part != 0).sum())  # a NaN is not zero either
    if wrong:
        raise CheckFailure(f"{outcome.place}: {wrong} of {part.numel()} zeros come back as something else")
