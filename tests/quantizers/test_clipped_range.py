"""The options clip and percentile of absmax, zero-point and per-channel."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.layer import Layer
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.host import contract
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.quantizers.absmax import AbsMaxQuantizer
from qconvert.quantizers.clipped_range import ClippedRange
from qconvert.quantizers.per_channel import PerChannelQuantizer
from qconvert.quantizers.zero_point import ZeroPointQuantizer

QUANTIZERS = (AbsMaxQuantizer, ZeroPointQuantizer, PerChannelQuantizer)
SCHEMES = [
    f"int{bits}-{granularity}{asym}" for bits, granularity, asym in product((4, 8), ("tensor", "channel", "g16"), ("", "-asym"))
]


def heavy_tailed(*shape: int) -> Tensor:
    """Student's t of 3 degrees of freedom: some weights are ten times as large as most."""
    drawn = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    return drawn[0] / drawn[1:].square().mean(0).sqrt()


def quantized(weight: Tensor, text: str, clip: str, percentile: float = 99.9) -> QuantizedTensor:
    scheme = QuantScheme.parse(text)
    kind = next(kind for kind in QUANTIZERS if kind().refuses(scheme) is None)
    options = {"clip": clip, "percentile": percentile}
    return contract.quantize(kind(**options), Layer("layer", "linear", weight), scheme)  # type: ignore[arg-type]


def squared_error(weight: Tensor, tensor: QuantizedTensor) -> Tensor:
    """Per group [out, groups]."""
    return affine.grouped((tensor.dequantize() - weight).square(), tensor.scheme).sum(-1)


# Every clip


@pytest.mark.parametrize("kind", QUANTIZERS, ids=lambda kind: kind.name)
def test_nothing_is_clipped_unless_asked_for(kind: type[Quantizer]) -> None:
    scheme = kind.default_scheme
    weight = heavy_tailed(4, 256)
    tensor, nearest = kind().quantize(Layer("layer", "linear", weight), scheme), round_to_nearest(weight, scheme)
    assert torch.equal(tensor.q, nearest.q)
    assert torch.equal(tensor.scale, nearest.scale)


@pytest.mark.parametrize("kind", QUANTIZERS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("clip", ["mse", "percentile"])
def test_the_three_share_the_options(kind: type[Quantizer], clip: str) -> None:
    weight, scheme = heavy_tailed(4, 256), kind.default_scheme
    clipped = kind(clip=clip, percentile=90).quantize(Layer("layer", "linear", weight), scheme)  # type: ignore[call-arg]
    assert not torch.equal(clipped.scale, round_to_nearest(weight, scheme).scale)


@pytest.mark.parametrize("clip", ["mse", "percentile"])
@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7, 1e-42, 1e-12, 3e38])
def test_a_constant_group_is_no_less_exact_than_without_clipping(value: float, text: str, clip: str) -> None:
    weight = torch.full((3, 32), value)
    tensor, nearest = quantized(weight, text, clip, 90), round_to_nearest(weight, QuantScheme.parse(text))
    assert ((tensor.dequantize() - weight).abs() <= (nearest.dequantize() - weight).abs()).all()
    if value == 0:
        assert torch.equal(tensor.q, nearest.q)
        assert torch.equal(tensor.scale, nearest.scale)


@pytest.mark.parametrize("clip", ["mse", "percentile"])
@pytest.mark.parametrize("text", SCHEMES)
def test_zeros_stay_exactly_zero(text: str, clip: str) -> None:
    weight = heavy_tailed(4, 64)
    weight[1], weight[:, :16], weight[:, ::3] = 0, 0, 0
    assert (quantized(weight, text, clip, 90).dequantize()[weight == 0] == 0).all()


@pytest.mark.parametrize("clip", ["mse", "percentile"])
@pytest.mark.parametrize("text", ["int4-channel", "int4-g16-asym"])
def test_each_row_is_clipped_by_itself(text: str, clip: str) -> None:
    """More rows than one block of affine.row_blocks holds."""
    weight = heavy_tailed(300, 1024)
    assert len(list(affine.row_blocks(*weight.shape))) > 2
    whole = quantized(weight, text, clip, 99)
    for row in (0, 127, 128, 299):
        alone = quantized(weight[row : row + 1], text, clip, 99)
        assert torch.equal(whole.q[row : row + 1], alone.q)
        assert torch.equal(whole.scale[row : row + 1], alone.scale)


# clip=mse


@pytest.mark.parametrize("text", SCHEMES)
def test_the_least_squares_clip_is_no_worse_than_rounding_in_any_group(text: str) -> None:
    for weight in (heavy_tailed(16, 256), heavy_tailed(16, 256) + 3, heavy_tailed(16, 256).clamp(-1, 1)):
        plain = squared_error(weight, round_to_nearest(weight, QuantScheme.parse(text)))
        best = squared_error(weight, quantized(weight, text, "mse"))
        assert (best <= plain).all()
        assert text.startswith("int8") or best.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("text", [text for text in SCHEMES if text.startswith("int4")])
def test_a_search_in_steps_of_a_hundredth_finds_little_more(text: str) -> None:
    weight, scheme = heavy_tailed(16, 256), QuantScheme.parse(text)
    ratios = [step / 100 for step in range(5, 125)]
    errors = torch.stack([squared_error(weight, round_to_nearest(weight, scheme, ratio)) for ratio in ratios])
    assert squared_error(weight, quantized(weight, text, "mse")).sum() <= 1.02 * errors.amin(0).sum()


# clip=percentile


def test_a_symmetric_range_ends_at_the_percentile_of_the_magnitudes() -> None:
    weight = torch.arange(1.0, 1001.0).reshape(1, 1000)
    weight[:, ::2] *= -1
    tensor = quantized(weight, "int8-channel", "percentile", 99)
    assert tensor.scale.item() == pytest.approx(990 / 127)
    assert tensor.q[0, 988:].tolist() == [-127 if column % 2 == 0 else 127 for column in range(988, 1000)]


def test_an_asymmetric_range_leaves_out_both_ends() -> None:
    weight = torch.arange(-300.0, 700.0).reshape(1, 1000)
    tensor = quantized(weight, "int8-channel-asym", "percentile", 99)
    assert tensor.scale.item() == pytest.approx((689 + 290) / 255)
    assert tensor.q[0, :11].tolist() == [-128] * 11
    assert tensor.q[0, 989:].tolist() == [127] * 11


def test_an_asymmetric_range_still_holds_zero() -> None:
    tensor = quantized(torch.arange(500.0, 600.0).reshape(1, 100), "int8-channel-asym", "percentile", 90)
    assert tensor.scale.item() == pytest.approx(589 / 255)


@pytest.mark.parametrize(("text", "scales"), [("int8-tensor", 1), ("int8-channel", 2), ("int8-g16", 8)])
def test_each_tensor_channel_or_group_has_its_own_percentile(text: str, scales: int) -> None:
    weight = heavy_tailed(2, 64)
    tensor = quantized(weight, text, "percentile", 75)
    ordered = weight.abs().reshape(scales, -1).sort(-1).values
    expected = ordered[:, ordered.shape[1] * 3 // 4 - 1] / 127
    assert torch.allclose(tensor.scale.flatten(), expected, rtol=2**-10)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("percentile", [100, 99.9])
def test_few_weights_lose_none_to_a_high_percentile(text: str, percentile: float) -> None:
    weight = heavy_tailed(2, 48)
    tensor = quantized(weight, text, "percentile", percentile)
    assert torch.equal(tensor.dequantize(), round_to_nearest(weight, QuantScheme.parse(text)).dequantize())


@pytest.mark.parametrize("text", SCHEMES)
def test_a_group_that_is_zero_but_for_what_would_be_clipped_is_kept(text: str) -> None:
    weight = torch.zeros(2, 48)
    weight[:, 5], weight[:, 20], weight[:, 40] = 0.3, -0.2, 0.1
    tensor = quantized(weight, text, "percentile", 90)
    assert torch.equal(tensor.dequantize(), round_to_nearest(weight, QuantScheme.parse(text)).dequantize())


@pytest.mark.parametrize("text", ["int8-tensor", "int8-tensor-asym"])
def test_a_percentile_of_a_large_tensor(text: str) -> None:
    """torch.quantile refuses more than 16 million numbers."""
    weight = torch.linspace(-1, 1, 17_000_000).reshape(1000, -1)
    tensor = quantized(weight, text, "percentile", 90)
    expected = 0.9 / 127 if text == "int8-tensor" else 1.6 / 255
    assert tensor.scale.item() == pytest.approx(expected, rel=1e-4)


# Wrong options


@pytest.mark.parametrize("percentile", [50, 100.1, -1, float("nan")])
def test_a_percentile_is_above_50_and_at_most_100(percentile: float) -> None:
    with pytest.raises(ValueError, match="percentile must be above 50 and at most 100"):
        ClippedRange("percentile", percentile)


def test_an_unknown_clip_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="clip must be 'none', 'mse' or 'percentile'"):
        ClippedRange("max")  # type: ignore[arg-type]
