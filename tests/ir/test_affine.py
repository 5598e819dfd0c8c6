"""ir/affine.py: every weight gets the nearest code of a range that covers it, whatever the scheme and the numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.scheme import QuantScheme

SCHEMES = [
    f"int{bits}-{granularity}{asym}"
    for bits, granularity, asym in product((4, 8), ("tensor", "channel", "g16", "g64"), ("", "-asym"))
]
ASYMMETRIC = [scheme for scheme in SCHEMES if "asym" in scheme]
SUBNORMAL = 1e-42


def normal(rows: int = 6, columns: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def roundtrip(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, dequantized)."""
    scale, zero_point = affine.choose_qparams(weight, scheme)
    q = affine.quantize(weight, scale, zero_point, scheme)
    return q, scale, affine.dequantize(q, scale, zero_point, scheme)


def per_weight(values: Tensor, weight: Tensor, scheme: QuantScheme) -> Tensor:
    """Values [out, groups] spread over the weights [out, in] that they are for."""
    return values.unsqueeze(-1).expand_as(affine.grouped(weight, scheme)).reshape(weight.shape)


# Groups


def test_groups_are_consecutive_inputs_of_one_output() -> None:
    weight = torch.arange(64.0).reshape(2, 32)
    assert affine.grouped(weight, QuantScheme.parse("int8-g16"))[1, 0].tolist() == list(range(32, 48))
    assert affine.grouped(weight, QuantScheme.parse("int8-channel"))[1, 0].tolist() == list(range(32, 64))
    assert affine.grouped(weight, QuantScheme.parse("int8-tensor"))[0, 0].tolist() == list(range(64))


@pytest.mark.parametrize("text", [text for text in SCHEMES if "tensor" not in text])
def test_a_group_is_quantized_by_its_own_weights_alone(text: str) -> None:
    scheme = QuantScheme.parse(text)
    weight = normal()
    before = roundtrip(weight, scheme)[2]
    width = scheme.group_size(128)
    weight[2, :width] *= 3
    changed = roundtrip(weight, scheme)[2] != before
    assert changed[2, :width].any()
    changed[2, :width] = False
    assert not changed.any()


# Rounding


@pytest.mark.parametrize("text", SCHEMES)
def test_no_other_code_is_nearer(text: str) -> None:
    scheme = QuantScheme.parse(text)
    weight = normal()
    scale, zero_point = affine.choose_qparams(weight, scheme)
    error = (affine.dequantize(affine.quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme) - weight).abs()
    low, high = scheme.code_range
    for code in range(low, high + 1):
        other = affine.dequantize(torch.full(weight.shape, code, dtype=torch.int8), scale, zero_point, scheme)
        assert (error <= (other - weight).abs() * (1 + 1e-5)).all()


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_the_range_covers_every_weight(text: str, shift: float) -> None:
    scheme = QuantScheme.parse(text)
    weight = normal() + shift
    q, scale, dequantized = roundtrip(weight, scheme)
    steps = ((dequantized - weight) / per_weight(scale, weight, scheme)).abs()
    # float16 scales move the ends of the range by 2^-11, those of asymmetric int4 by 2^-7, times the largest code.
    moved = 15 * 2**-7 if text.startswith("int4") and not scheme.symmetric else 127 * 2**-11
    opposite = (scheme.bits == 4 and scheme.symmetric) & (q == 7)  # int4 has one code less on the other side of its maximum
    assert steps[~opposite].max() <= 0.5 + moved
    assert steps.max() <= 1 + moved


@pytest.mark.parametrize("text", SCHEMES)
def test_codes_survive_another_round(text: str) -> None:
    scheme = QuantScheme.parse(text)
    weight = normal()
    scale, zero_point = affine.choose_qparams(weight, scheme)
    q = affine.quantize(weight, scale, zero_point, scheme)
    assert torch.equal(affine.quantize(affine.dequantize(q, scale, zero_point, scheme), scale, zero_point, scheme), q)


@pytest.mark.parametrize("text", SCHEMES)
def test_what_the_codes_can_hold_survives_bit_for_bit(text: str) -> None:
    scheme = QuantScheme.parse(text)
    low, high = scheme.code_range
    weight = torch.arange(low, high + 1).repeat(2, 64)[:, :2048].float() / 16
    group = scheme.group_size(2048)
    weight[:, ::group], weight[:, 1::group] = low / 16, high / 16
    assert torch.equal(roundtrip(weight, scheme)[2], weight)


def test_symmetric_int4_follows_the_signed_maximum() -> None:
    weight = torch.tensor([[1.0, -4.0], [-1.0, 4.0]])
    scale, _ = affine.choose_qparams(weight, QuantScheme.parse("int4"))
    assert scale.tolist() == [[0.5], [-0.5]]
    tied = torch.tensor([[-2.0, 3.0, -3.0, 1.0], [1.0, -3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])  # the first of equal magnitudes
    scale, _ = affine.choose_qparams(tied, QuantScheme.parse("int4-channel"))
    assert scale.tolist() == [[-0.375], [0.375], [1.0]]
    groups = normal(512, 32)
    _, _, signed = roundtrip(groups, QuantScheme.parse("int4"))
    largest = groups.abs().amax(1, keepdim=True)
    for divisor in (7, 8):
        other = torch.round(groups / (largest / divisor)).clamp(-8, 7) * (largest / divisor)
        assert (signed - groups).square().mean() < 0.9 * (other - groups).square().mean()


# Zero points


@pytest.mark.parametrize("text", ASYMMETRIC)
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0], ids=["around zero", "above zero", "below zero"])
def test_zero_is_always_a_code(text: str, shift: float) -> None:
    scheme = QuantScheme.parse(text)
    weight = normal() + shift
    weight[:, ::7] = 0
    assert (roundtrip(weight, scheme)[2][:, ::7] == 0).all()


def test_a_range_on_one_side_of_zero_begins_at_zero() -> None:
    weight = torch.tensor([[1.0, 2.55], [-1.0, -2.55]])
    scale, zero_point = affine.choose_qparams(weight, QuantScheme.parse("int8-asym"))
    assert scale.flatten().tolist() == pytest.approx([0.01, 0.01])
    assert zero_point is not None
    assert zero_point.tolist() == [[-128], [127]]


# Clipping


@pytest.mark.parametrize("text", SCHEMES)
def test_a_clip_ratio_shrinks_the_range(text: str) -> None:
    scheme = QuantScheme.parse(text)
    weight = normal()
    whole, _ = affine.choose_qparams(weight, scheme)
    half, _ = affine.choose_qparams(weight, scheme, 0.5)
    assert torch.equal(half, whole / 2)
    ratios = torch.ones(scheme.scale_shape(*weight.shape))
    ratios[0, 0] = 0.5
    mixed, _ = affine.choose_qparams(weight, scheme, ratios)
    assert mixed[0, 0] == half[0, 0]
    assert torch.equal(mixed.flatten()[1:], whole.flatten()[1:])


# Stored scales


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e7, 1e30])
def test_a_stored_scale_is_rounded_once(text: str, size: float) -> None:
    scheme = QuantScheme.parse(text)
    scale, _ = affine.choose_qparams(normal() * size, scheme)
    assert torch.equal(affine.round_scale(scale, scheme), scale)
    if affine.fits_float16(scale) and scheme.scale_dtype == torch.float16:
        assert torch.equal(scale.half().float(), scale)


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e7, 1e30])
@pytest.mark.parametrize("text", ["int4-g16", "int4-g16-asym", "int8-g16"])
def test_scales_beyond_float16_stay_float32(text: str, size: float) -> None:
    """Fault 13."""
    scheme = QuantScheme.parse(text)
    relative = (roundtrip(normal() * size, scheme)[2] / size - normal()).norm() / normal().norm()
    assert relative < (0.02 if text.startswith("int8") else 0.2)
    one_small = normal()
    one_small[0, :16] *= 1e-7
    dequantized = roundtrip(one_small, scheme)[2]
    assert (dequantized[0, :16] - one_small[0, :16]).norm() < 0.2 * one_small[0, :16].norm()


@pytest.mark.parametrize(("text", "differences"), [("int4-g16-asym", range(-15, 16)), ("int4-g16", range(-8, 8))])
def test_float16_multiplies_int4_exactly(text: str, differences: range) -> None:
    """transformers dequantizes in the dtype of the scale."""
    scale = affine.round_scale(torch.logspace(-3.8, 3, 500).reshape(1, -1), QuantScheme.parse(text))
    for difference in differences:
        assert torch.equal((difference * scale.half()).float(), difference * scale)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_scale_survives_the_dtype_of_the_model_and_the_codes_are_those_for_it(text: str, dtype: torch.dtype) -> None:
    """transformers and vLLM cast scales to it. It costs most in small groups: their largest weight is no longer exact."""
    scheme = replace(QuantScheme.parse(text), scale_bits=8 if dtype == torch.bfloat16 else 11)
    weight = normal(512, 512)
    q, scale, dequantized = roundtrip(weight, scheme)
    assert torch.equal(scale.to(dtype).float(), scale)
    assert torch.equal(affine.quantize(weight, scale, affine.choose_qparams(weight, scheme)[1], scheme), q)
    exact = roundtrip(weight, QuantScheme.parse(text))[2]
    lost = (dequantized - weight).square().mean() / (exact - weight).square().mean()
    assert lost < (1.08 if "int8-g" in text else 1.01)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e7, 1e30])
def test_bfloat16_holds_scales_of_any_size(text: str, size: float) -> None:
    scale, _ = affine.choose_qparams(normal() * size, replace(QuantScheme.parse(text), scale_bits=8))
    assert torch.equal(scale.bfloat16().float(), scale)


@pytest.mark.parametrize("text", [text for text in SCHEMES if QuantScheme.parse(text).scale_dtype == torch.float32])
def test_without_a_narrow_model_a_float32_scale_stays_as_it_is(text: str) -> None:
    scale = normal().abs() + 1e-6
    assert torch.equal(affine.round_scale(scale, QuantScheme.parse(text)), scale)


# Groups that have no range (fault 13)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("value", [0.0, SUBNORMAL, -SUBNORMAL], ids=["zero", "subnormal", "negative subnormal"])
def test_groups_of_nothing_are_exact_zeros_with_scale_1(text: str, value: float) -> None:
    scheme = QuantScheme.parse(text)
    _, scale, dequantized = roundtrip(torch.full((2, 128), value), scheme)
    assert scale.unique().tolist() == [1]
    assert dequantized.unique().tolist() == [0]


@pytest.mark.parametrize("text", [text for text in SCHEMES if "tensor" not in text])
def test_a_group_of_nothing_costs_the_others_nothing(text: str) -> None:
    scheme = QuantScheme.parse(text)
    weight = normal()
    alone = roundtrip(weight[1:], scheme)[2]
    weight[0] = 0
    dequantized = roundtrip(weight, scheme)[2]
    assert torch.equal(dequantized[1:], alone)
    assert dequantized[0].unique().tolist() == [0]


@pytest.mark.parametrize("text", SCHEMES)
def test_the_range_of_finite_weights_may_be_wider_than_float32(text: str) -> None:
    scheme = QuantScheme.parse(text)
    weight = torch.tensor([[3e38, -3e38, 1e38, 0.0]]).repeat(2, 32)
    _, scale, dequantized = roundtrip(weight, scheme)
    assert torch.isfinite(scale).all()
    assert torch.isfinite(dequantized).all()
    assert ((dequantized - weight) / 3e38).abs().max() < (0.13 if scheme.bits == 4 else 0.01)
