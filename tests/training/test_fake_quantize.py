"""Fake quantization by hand: values, gradients, step sizes that are learned, ranges that follow the batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.activations import ROWS_AFTER, SYMMETRIC_ROWS
from qconvert.ir.scheme import QuantScheme
from qconvert.training.fake_quantize import fake_quantize
from qconvert.training.inputs import MOMENTUM, RowInput, StaticInput
from qconvert.training.weights import WeightQuantizer

A8 = QuantScheme.parse("int8-channel-a8-static").activations
SYMMETRIC_A8 = QuantScheme.parse("int8-channel-a8-static-sym").activations


def test_values_become_what_their_codes_stand_for_and_gradients_pass_within_the_range() -> None:
    x = torch.tensor([-3.0, -0.9, 0.24, 0.26, 2.4, 9.0], requires_grad=True)
    result = fake_quantize(x, torch.tensor(0.5), torch.tensor(2.0), 0, 7)
    assert result.tolist() == [-1.0, -1.0, 0.0, 0.5, 2.5, 2.5]
    result.backward(torch.arange(1.0, 7.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0]


def test_a_learned_step_has_the_gradient_of_the_paper() -> None:
    """LSQ, eq. 3: round(v / s) - v / s within the range, and the outermost codes beyond it."""
    values, scale = torch.tensor([[-9.0, 0.7, 1.3, 0.2], [9.0, -0.6, 0.1, 2.0]]), torch.tensor(0.5, requires_grad=True)
    fake_quantize(values, scale, torch.tensor(0.0), -8, 7).sum().backward()
    ratio = values / 0.5
    expected = torch.where(ratio <= -8, -8.0, torch.where(ratio >= 7, 7.0, ratio.round() - ratio)).sum()
    assert scale.grad is not None
    assert scale.grad == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("text", ["int8-channel", "int8-channel-asym", "int4-g16", "int4-g16-asym", "int4-channel"])
@pytest.mark.parametrize("learned", [False, True])
def test_a_forward_computes_with_the_codes_that_are_written(text: str, learned: bool) -> None:
    scheme, weight = QuantScheme.parse(text), torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(scheme, weight, learned=learned)
    quantized = quantizer.quantized(weight)
    assert torch.equal(quantizer(weight), quantized.dequantize())
    assert torch.equal(affine.round_scale(quantized.scale, scheme), quantized.scale)
    if not learned:
        scale, zero_point = affine.choose_qparams(weight, scheme)
        assert torch.equal(quantized.q, affine.quantize(weight, scale, zero_point, scheme))


def test_the_gradient_of_a_learned_step_is_of_the_size_of_those_of_weights() -> None:
    """LSQ, section 2.2: times 1 / sqrt(weights of a step * largest code)."""
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    quantizer = WeightQuantizer(QuantScheme.parse("int4-channel"), weight, learned=True)
    assert quantizer.scale is not None
    quantizer(weight).sum().backward()
    step = affine.round_scale(quantizer.scale.detach(), quantizer.scheme)
    ratio = weight / step
    slopes = torch.where(ratio <= -8, -8.0, torch.where(ratio >= 7, 7.0, ratio.round() - ratio))
    assert quantizer.scale.grad is not None
    assert float(quantizer.scale.grad) == pytest.approx(float(slopes.sum()) / math.sqrt(32 * 7), rel=1e-5)


def test_first_steps_are_those_of_the_paper_or_cover_the_range() -> None:
    weight = torch.tensor([[1.0, -1.0, 0.5, -4.0], [0.0, 0.0, 0.0, 0.0]])
    quantizer = WeightQuantizer(QuantScheme.parse("int4-channel"), weight, learned=True)
    assert quantizer.scale is not None
    covering = 0.5  # -4 has the code -8
    assert quantizer.scale.tolist()[0] == [pytest.approx(min(covering, 2 * 1.625 / math.sqrt(7)))]
    assert torch.equal(quantizer(weight)[1], weight[1])


def ranges(batches: list[Tensor], learned: bool = False) -> StaticInput:
    assert A8 is not None
    quantizer = StaticInput(A8, learned=learned)
    for batch in batches:
        quantizer(batch)
    return quantizer


def test_a_range_follows_the_batches_by_a_moving_average() -> None:
    quantizer = ranges([torch.tensor([[-1.0, 2.0]]), torch.tensor([[-3.0, 1.0]]), torch.tensor([[0.0, 6.0]])])
    low = high = None
    for smallest, largest in ((-1.0, 2.0), (-3.0, 1.0), (0.0, 6.0)):
        low = smallest if low is None else low + MOMENTUM * (smallest - low)
        high = largest if high is None else high + MOMENTUM * (largest - high)
    assert float(quantizer.minimum) == pytest.approx(low)
    assert float(quantizer.maximum) == pytest.approx(high)
    assert low is not None
    assert high is not None
    assert quantizer.codes.scale == pytest.approx((high - low) / 255)


def test_in_eval_mode_the_range_stays() -> None:
    quantizer = ranges([torch.tensor([[-1.0, 2.0]])])
    before = quantizer.codes
    quantizer.eval()
    result = quantizer(torch.tensor([[-100.0, 100.0]]))
    assert quantizer.codes == before
    assert result.tolist() == [[pytest.approx(before.low), pytest.approx(before.high)]]


def test_a_learned_range_begins_with_the_first_batch_and_is_a_parameter_from_then_on() -> None:
    quantizer = ranges([torch.tensor([[-1.0, 2.0]]), torch.tensor([[-50.0, 50.0]])], learned=True)
    assert quantizer.codes.scale == pytest.approx(3 / 255)
    quantizer(torch.tensor([[-1.0, 2.0, 50.0]])).sum().backward()
    assert quantizer.scale is not None
    assert quantizer.scale.grad is not None
    assert float(quantizer.scale.grad) > 0


def test_symmetric_codes_lie_around_0_unless_nothing_is_negative() -> None:
    assert SYMMETRIC_A8 is not None
    both, positive = StaticInput(SYMMETRIC_A8, learned=False), StaticInput(SYMMETRIC_A8, learned=False)
    both(torch.tensor([-1.0, 2.0]))
    positive(torch.tensor([0.0, 2.0]))
    assert (both.codes.zero_point, positive.codes.zero_point) == (128, 0)


@pytest.mark.parametrize("rows", [SYMMETRIC_ROWS, ROWS_AFTER["Relu"], ROWS_AFTER["Gelu"]])
def test_rows_have_a_step_each_and_rows_of_zeros_stay_zeros(rows: object) -> None:
    x = torch.tensor([[0.1, 0.5, 1.0], [0.0, 0.0, 0.0], [10.0, 20.0, 40.0]], requires_grad=True)
    quantizer = RowInput(rows)  # type: ignore[arg-type]
    result = quantizer(x)
    assert result[1].tolist() == [0.0, 0.0, 0.0]
    steps = quantizer.rows.step_of(x.detach())
    assert bool(((result - x).abs() <= steps * 0.51).all())
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0] * 3] * 3
