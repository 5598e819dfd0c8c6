"""The built-in quantizers: what each accepts, that none is upset by odd weights, and what sets those that need data apart."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from qconvert.ir import affine
from qconvert.ir.layer import CalibrationStats, Layer, LinearGroup, Producer
from qconvert.ir.quantized import QuantizedTensor
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.host import contract
from qconvert.plugin.observer import AbsMax, Gram, SampledRows
from qconvert.plugin.quantizer import Quantizer, round_to_nearest
from qconvert.quantizers.absmax import AbsMaxQuantizer
from qconvert.quantizers.awq import AWQQuantizer
from qconvert.quantizers.clip_search import least_squares_clip
from qconvert.quantizers.gptq import GPTQQuantizer
from qconvert.quantizers.hqq import HQQQuantizer
from qconvert.quantizers.llm_int8 import LLMInt8Quantizer
from qconvert.quantizers.nf4 import NF4Quantizer
from qconvert.quantizers.per_channel import PerChannelQuantizer
from qconvert.quantizers.row_quantization import quantized_rows
from qconvert.quantizers.smoothquant import SmoothQuantQuantizer
from qconvert.quantizers.zero_point import ZeroPointQuantizer

BUILTINS: list[Quantizer] = [
    AbsMaxQuantizer(), ZeroPointQuantizer(), PerChannelQuantizer(), HQQQuantizer(), AWQQuantizer(), GPTQQuantizer(),
    LLMInt8Quantizer(), SmoothQuantQuantizer(), NF4Quantizer(),
]  # fmt: skip
WEIGHT_ONLY = [
    f"int{bits}-{granularity}{asym}" for bits, granularity, asym in product((4, 8), ("tensor", "channel", "g16"), ("", "-asym"))
]
# int8 activations have kernels with int8 weights per tensor or channel only; the plan refuses the rest for every quantizer.
SCHEMES = [*WEIGHT_ONLY, "int8-tensor-a8", "int8-tensor-asym-a8", "int8-channel-a8", "int8-channel-asym-a8"]
ACCEPTED = {
    "absmax": {scheme for scheme in SCHEMES if "asym" not in scheme},
    "zero-point": {scheme for scheme in SCHEMES if "asym" in scheme},
    "per-channel": {scheme for scheme in SCHEMES if "tensor" not in scheme},
    "hqq": {scheme for scheme in WEIGHT_ONLY if "tensor" not in scheme},
    "awq": {scheme for scheme in WEIGHT_ONLY if "tensor" not in scheme},
    "gptq": {scheme for scheme in WEIGHT_ONLY if "tensor" not in scheme},
    "llm-int8": {"int8-tensor-a8", "int8-channel-a8"},
    "smoothquant": {scheme for scheme in SCHEMES if scheme.startswith("int8")},
    "nf4": set(WEIGHT_ONLY),  # its own formats are in test_codebooks
}
PAIRS = [
    pytest.param(quantizer, scheme, id=f"{quantizer.name}-{scheme}")
    for quantizer in BUILTINS
    for scheme in SCHEMES
    if scheme in ACCEPTED[quantizer.name]
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def stats_of(rows: Tensor) -> CalibrationStats:
    observers = (AbsMax(), Gram(), SampledRows())
    for observer in observers:
        observer.update(rows, torch.ones(len(rows)))
    return CalibrationStats(len(rows), {observer.name: observer.finalize() for observer in observers})


def layer_of(weight: Tensor, rows: Tensor | None = None, name: str = "layer") -> Layer:
    rows = normal(64, weight.shape[1], seed=9) if rows is None else rows
    return Layer(name, "linear", weight, None, stats_of(rows))


def with_zero_parts(weight: Tensor) -> Tensor:
    weight[1], weight[:, :16] = 0, 0
    return weight


WEIGHTS = {
    "normal": normal(6, 48),
    "one output": normal(1, 48),
    "far from zero": normal(6, 48) * 0.01 + 5,
    "zero channel and group": with_zero_parts(normal(6, 48)),
    "zero": torch.zeros(6, 48),
    "constant": torch.full((6, 48), -0.7),
    "subnormal": normal(6, 48) * 1e-42,
    "underflowing float16": normal(6, 48) * 1e-12,
    "huge": normal(6, 48).clamp(-3, 3) * 1e38,
    "one huge weight": normal(6, 48).index_fill(1, torch.tensor([7]), 1e4),
    "transposed": normal(48, 6).T,
}


# Every quantizer with every scheme that it accepts


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("quantizer", BUILTINS, ids=lambda quantizer: quantizer.name)
def test_a_quantizer_accepts_what_makes_sense_for_it_and_says_why_not(quantizer: Quantizer, scheme: str) -> None:
    reason = quantizer.refuses(QuantScheme.parse(scheme))
    assert (reason is None) == (scheme in ACCEPTED[quantizer.name]), reason
    assert reason is None or len(reason) > 20


@pytest.mark.parametrize("quantizer", BUILTINS, ids=lambda quantizer: quantizer.name)
def test_the_default_scheme_is_one_that_it_accepts(quantizer: Quantizer) -> None:
    assert quantizer.refuses(quantizer.default_scheme) is None


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("quantizer", "text"), PAIRS)
def test_odd_weights_survive(quantizer: Quantizer, text: str, kind: str) -> None:
    """Fault 13. The contract sees finite scales, codes in range, and that no input was written to."""
    weight, scheme = WEIGHTS[kind], QuantScheme.parse(text)
    if isinstance(quantizer, AWQQuantizer):
        quantizer = replace(quantizer, min_clip=1.0)  # a clipped range does not cover every weight, on purpose
    if isinstance(quantizer, GPTQQuantizer):
        quantizer = replace(quantizer, min_clip=1.0, damp=1e9)  # nor is a code that makes up for others the nearest
    if isinstance(quantizer, SmoothQuantQuantizer):
        quantizer = replace(quantizer, damp=None)
    if isinstance(quantizer, HQQQuantizer):
        quantizer = replace(quantizer, iterations=0)  # nor does a fitted one; test_hqq_is_not_upset_by_odd_weights
    tensor = contract.quantize(quantizer, layer_of(weight), scheme)
    dequantized = tensor.dequantize()
    assert torch.isfinite(dequantized).all()
    assert (dequantized[weight == 0] == 0).all()
    step = affine.grouped(weight, scheme) * 0 + tensor.scale.abs().unsqueeze(-1)
    # Half a step; scales of few bits move the ends of the range, symmetric int4 lacks the code 8.
    allowed = 1 + 8 * 2**-8 if scheme.bits == 4 else 0.57
    assert ((dequantized - weight).abs() <= allowed * step.reshape(weight.shape)).all()


@pytest.mark.parametrize(("quantizer", "text"), PAIRS)
def test_widths_that_no_kernel_block_divides(quantizer: Quantizer, text: str) -> None:
    width = 16 if "-g16" in text else 33
    tensor = contract.quantize(quantizer, layer_of(normal(5, width)), QuantScheme.parse(text))
    assert (tensor.dequantize() - normal(5, width)).norm() < (0.25 if text.startswith("int4") else 0.03) * normal(
        5, width
    ).norm()


@pytest.mark.parametrize(("quantizer", "text"), PAIRS)
def test_the_same_layer_gives_the_same_codes(quantizer: Quantizer, text: str) -> None:
    """Fault 28: not even the state of the random number generators matters."""
    first = quantizer.quantize(layer_of(normal(6, 48)), QuantScheme.parse(text))
    torch.rand(7)
    second = quantizer.quantize(layer_of(normal(6, 48)), QuantScheme.parse(text))
    assert torch.equal(first.q, second.q)
    assert torch.equal(first.scale, second.scale)
    assert (first.zero_point is None) == (second.zero_point is None)
    assert first.zero_point is None or torch.equal(first.zero_point, second.zero_point)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantizer", BUILTINS[:3], ids=lambda quantizer: quantizer.name)
def test_three_of_them_round_to_nearest(quantizer: Quantizer) -> None:
    for text in ACCEPTED[quantizer.name]:
        scheme = QuantScheme.parse(text)
        tensor, nearest = quantizer.quantize(layer_of(normal(6, 48)), scheme), round_to_nearest(normal(6, 48), scheme)
        assert torch.equal(tensor.dequantize(), nearest.dequantize())
        assert (tensor.outliers, tensor.smoothing_scale) == (None, None)


def test_which_of_them_need_data_and_only_llm_int8_has_outliers_unless_the_options_say_so() -> None:
    assert [quantizer.name for quantizer in BUILTINS if quantizer.observers] == ["awq", "gptq", "llm-int8", "smoothquant"]
    assert [quantizer.name for quantizer in BUILTINS if quantizer.has_outliers] == ["llm-int8"]
    assert SmoothQuantQuantizer(max_outliers=4).has_outliers
    assert not LLMInt8Quantizer(max_outliers=0).has_outliers


# hqq

HQQ_SCHEMES = [scheme for scheme in SCHEMES if scheme in ACCEPTED["hqq"]]


def heavy_tailed(*shape: int) -> Tensor:
    """Student's t of 3 degrees of freedom: some weights are ten times as large as most."""
    return normal(*shape) / normal(3, *shape, seed=1).square().mean(0).sqrt()


def hqq(weight: Tensor, text: str, **options: float) -> QuantizedTensor:
    return contract.quantize(HQQQuantizer(**options), Layer("layer", "linear", weight), QuantScheme.parse(text))  # type: ignore[arg-type]


def norm_loss(weight: Tensor, tensor: QuantizedTensor, norm: float = 0.7) -> Tensor:
    """Sum over each group of |w - dequantize(q)|^norm: [out, groups]."""
    return affine.grouped((tensor.dequantize() - weight).abs().pow(norm), tensor.scheme).sum(-1)


@pytest.mark.parametrize("text", HQQ_SCHEMES)
def test_hqq_loses_less_in_its_norm_than_rounding_and_the_best_clip_and_more_in_no_group(text: str) -> None:
    weight, scheme = heavy_tailed(16, 256), QuantScheme.parse(text)
    fitted = norm_loss(weight, hqq(weight, text))
    for clip in (1.0, least_squares_clip(weight, scheme)):
        rounded = norm_loss(weight, round_to_nearest(weight, scheme, clip))
        assert (fitted <= rounded * (1 + 1e-5)).all()
        assert fitted.sum() < 0.998 * rounded.sum()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("text", HQQ_SCHEMES)
def test_hqq_is_not_upset_by_odd_weights(text: str, kind: str) -> None:
    """Fault 13."""
    weight = WEIGHTS[kind]
    tensor, nearest = hqq(weight, text), round_to_nearest(weight, QuantScheme.parse(text))
    assert torch.isfinite(tensor.dequantize()).all()
    assert (tensor.dequantize()[weight == 0] == 0).all()
    assert (norm_loss(weight, tensor) <= norm_loss(weight, nearest) * (1 + 1e-5)).all()


@pytest.mark.parametrize("text", HQQ_SCHEMES)
def test_without_iterations_hqq_rounds_to_nearest(text: str) -> None:
    weight = heavy_tailed(16, 256)
    tensor, nearest = hqq(weight, text, iterations=0), round_to_nearest(weight, QuantScheme.parse(text))
    assert torch.equal(tensor.q, nearest.q)
    assert torch.equal(tensor.scale, nearest.scale)


@pytest.mark.parametrize("text", HQQ_SCHEMES)
def test_weights_on_the_grid_of_a_scheme_are_exact(text: str) -> None:
    scheme = QuantScheme.parse(text)
    codes = torch.arange(scheme.code_range[0], scheme.code_range[1] + 1).float()
    weight = codes[torch.arange(256) * 7 % len(codes)].expand(4, 256) * torch.tensor([0.25, -0.5, 1.0, 2.0])[:, None]
    for start in range(0, 256, 16):  # every group reaches both ends of the range
        weight[:, start], weight[:, start + 1] = weight.amin(1), weight.amax(1)
    assert torch.equal(hqq(weight, text).dequantize(), weight)


@pytest.mark.parametrize("text", [text for text in HQQ_SCHEMES if "asym" in text])
def test_the_zero_points_of_hqq_are_integers_and_give_exact_zeros(text: str) -> None:
    weight = heavy_tailed(16, 256).abs() - 0.5
    weight[:, ::5] = 0
    tensor = hqq(weight, text)
    assert tensor.zero_point is not None
    assert tensor.zero_point.dtype == torch.int8
    assert len(tensor.zero_point.unique()) > 1
    assert (tensor.dequantize()[:, ::5] == 0).all()


def test_a_smaller_norm_gives_up_more_of_the_large_errors() -> None:
    weight = heavy_tailed(64, 256)
    half, one = hqq(weight, "int4-channel-asym", norm=0.5), hqq(weight, "int4-channel-asym", norm=1)
    assert norm_loss(weight, half, 0.5).sum() < norm_loss(weight, one, 0.5).sum()
    assert norm_loss(weight, half, 2).sum() > norm_loss(weight, one, 2).sum()


@pytest.mark.parametrize("text", HQQ_SCHEMES)
def test_hqq_treats_large_and_small_weights_alike(text: str) -> None:
    weight = heavy_tailed(4, 256)
    assert torch.equal(hqq(weight, text).q, hqq(weight / 64, text).q)


@pytest.mark.parametrize("text", ["int4-channel-asym", "int8-g16"])
def test_hqq_fits_each_row_by_itself(text: str) -> None:
    """More rows than one block of affine.row_blocks holds."""
    weight = heavy_tailed(300, 1024)
    whole = hqq(weight, text)
    for row in (0, 127, 128, 299):
        assert torch.equal(whole.q[row : row + 1], hqq(weight[row : row + 1], text).q)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"iterations": -1}, "iterations must be at least 0"),
        ({"norm": 0}, "norm above 0 and at most 1"),
        ({"norm": 1.5}, "norm above 0 and at most 1"),
        ({"beta": 0}, "beta must be above 0"),
        ({"growth": 0.9}, "growth at least 1"),
    ],
)
def test_hqq_refuses_options_that_make_no_sense(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HQQQuantizer(**options)  # type: ignore[arg-type]


# llm-int8

INT8 = QuantScheme.parse("int8-channel-a8")


def rows_with_peaks(width: int, peaks: dict[int, float]) -> Tensor:
    """Inputs of magnitude 1 at most, but for one entry in some columns."""
    rows = normal(32, width, seed=3).clamp(-1, 1)
    for column, peak in peaks.items():
        rows[column % 32, column] = peak
    return rows


def outliers_of(peaks: dict[int, float], weight: Tensor | None = None, **options: float | None) -> QuantizedTensor:
    weight = normal(6, 48) if weight is None else weight
    options = {"threshold": 6.0, **options}
    return LLMInt8Quantizer(**options).quantize(layer_of(weight, rows_with_peaks(48, peaks)), INT8)  # type: ignore[arg-type]


def columns(tensor: QuantizedTensor) -> list[int]:
    return [] if tensor.outliers is None else tensor.outliers.columns.tolist()


def test_outliers_are_the_columns_whose_magnitude_passes_the_threshold() -> None:
    assert columns(outliers_of({40: 60.0, 3: -7.0, 17: 6.5, 20: 6.0, 21: 5.9})) == [3, 17, 40]
    assert columns(outliers_of({40: 60.0, 3: -7.0, 17: 6.5}, threshold=50.0)) == [40]


def test_of_too_many_outliers_the_largest_are_taken() -> None:
    peaks = {5: 10.0, 6: -40.0, 7: 20.0, 8: 30.0}
    assert columns(outliers_of(peaks, max_outliers=2)) == [6, 8]
    assert columns(outliers_of(peaks, max_outliers=0)) == []


def test_of_equal_outliers_the_first_are_taken() -> None:
    assert columns(outliers_of(dict.fromkeys(range(10, 30), 8.0), max_outliers=3)) == [10, 11, 12]


def test_no_more_than_32_columns_unless_asked_for() -> None:
    assert len(columns(outliers_of(dict.fromkeys(range(48), 8.0)))) == 32


def test_without_outliers_the_tensor_has_none() -> None:
    assert outliers_of({}).outliers is None


def test_outlier_columns_are_float16_and_q_holds_all_columns() -> None:
    weight = normal(6, 48)
    tensor = outliers_of({7: 10.0}, weight)
    assert torch.equal(tensor.dequantize()[:, 7], weight[:, 7].half().float())
    plain = round_to_nearest(weight, INT8)
    assert torch.equal(tensor.q, plain.q)
    rest = [column for column in range(48) if column != 7]
    assert torch.equal(tensor.dequantize()[:, rest], plain.dequantize()[:, rest])


def test_outlier_columns_beyond_float16_are_float32() -> None:
    weight = normal(6, 48)
    weight[2, 7] = 1e6
    assert torch.equal(outliers_of({7: 10.0}, weight).dequantize()[:, 7], weight[:, 7])


def test_convolutions_have_no_outliers() -> None:
    layer = replace(layer_of(normal(6, 48), rows_with_peaks(48, {7: 10.0})), kind="conv2d")
    assert LLMInt8Quantizer().quantize(layer, INT8).outliers is None


def test_outliers_pay_on_int8_activations() -> None:
    """Rows quantized with one scale each lose the small inputs beside a large one; without the outliers they don't."""
    weight, rows = normal(16, 48), rows_with_peaks(48, {})
    rows[:, 7] = 60.0
    tensor = LLMInt8Quantizer().quantize(layer_of(weight, rows), INT8)
    plain = round_to_nearest(weight, INT8)
    exact = rows @ weight.T

    def int8_rows(x: Tensor) -> Tensor:
        scale = x.abs().amax(1, keepdim=True) / 127
        return torch.round(x / scale) * scale

    masked = rows.index_fill(1, torch.tensor([7]), 0)
    split = int8_rows(masked) @ plain.dequantize().T + rows[:, 7:8] @ tensor.dequantize()[:, 7:8].T
    assert (split - exact).norm() < 0.1 * (int8_rows(rows) @ plain.dequantize().T - exact).norm()


def crowded_rows(*peaks: float, width: int = 48) -> Tensor:
    """Inputs of magnitude 1 or so, but for some columns that are always large: in columns 5, 10, 15, ..."""
    rows = normal(200, width, seed=3)
    for number, peak in enumerate(peaks, 1):
        rows[:, 5 * number] = peak
    return rows


def chosen_by_error(rows: Tensor, **options: int) -> list[int]:
    return columns(LLMInt8Quantizer(**options).quantize(layer_of(normal(6, rows.shape[1]), rows), INT8))


def rows_error(rows: Tensor, kept: list[int]) -> float:
    return float((quantized_rows(rows, torch.tensor(kept, dtype=torch.int64)) - rows).square().sum())


def test_rows_are_quantized_with_one_scale_each_and_outlier_columns_left_alone() -> None:
    rows = torch.tensor([[100.0, 0.5, -1.0, 0.26], [0, 0, 0, 0], [7.0, 0, 0, 0]])
    found = quantized_rows(rows, torch.tensor([0]))
    assert torch.equal(found[:, 0], rows[:, 0])
    assert torch.equal(found[1:], rows[1:])
    assert torch.allclose(found[0, 1:], torch.tensor([64, -127, 33]) / 127.49)
    assert quantized_rows(rows)[0, 3] == 0


def test_rows_behind_an_activation_function_have_twice_as_many_steps() -> None:
    for function, made_by, less in ((torch.relu, "Relu", 0.3), (nn.functional.gelu, "Gelu", 0.35)):
        rows = function(normal(64, 48) * 3)
        symmetric, found = ((quantized_rows(rows, made_by=made) - rows).square().sum() for made in (None, made_by))
        assert found < less * symmetric, made_by


def test_without_a_threshold_the_columns_are_those_that_save_enough_error() -> None:
    assert chosen_by_error(crowded_rows(60.0, -90.0)) == [5, 10]
    assert chosen_by_error(crowded_rows()) == []


def test_columns_chosen_by_error_lower_it() -> None:
    rows = crowded_rows(60.0, -90.0, 30.0, 25.0)
    kept = chosen_by_error(rows)
    assert kept == [5, 10, 15, 20]
    assert rows_error(rows, kept) < 0.01 * rows_error(rows, [])


def test_a_column_that_does_not_stretch_the_rows_pays_for_nothing() -> None:
    """Above any threshold, and yet all columns are alike."""
    assert chosen_by_error(normal(200, 48, seed=3) * 100) == []


def test_no_more_columns_than_allowed_and_the_largest_first() -> None:
    rows = crowded_rows(*(100.0 - 10 * number for number in range(9)))
    assert chosen_by_error(rows, max_outliers=8) == [5 * number for number in range(1, 9)]
    assert chosen_by_error(rows, max_outliers=0) == []


def test_linears_that_share_an_input_share_their_outlier_columns() -> None:
    """Whatever their weights: different columns would mean rows that are quantized once more for each."""
    rows, quantizer = crowded_rows(60.0, -90.0), LLMInt8Quantizer()
    weights = (normal(6, 48), normal(16, 48, seed=1) * torch.logspace(-2, 2, 48), torch.zeros(3, 48))
    assert {tuple(columns(quantizer.quantize(layer_of(weight, rows), INT8))) for weight in weights} == {(5, 10)}


def test_inputs_of_nothing_but_zeros_have_no_outliers() -> None:
    assert chosen_by_error(torch.zeros(8, 48)) == []


# smoothquant


def kernel_error(rows: Tensor, weight: Tensor, scale: Tensor | float, scheme: QuantScheme = INT8) -> float:
    """Squared error of the output when the kernel quantizes rows / scale."""
    seen = quantized_rows(rows / scale) if scheme.activations else rows / scale
    return float((seen @ round_to_nearest(weight * scale, scheme).dequantize().T - rows @ weight.T).square().sum())


def smoothed(rows: Tensor, *weights: Tensor, producer: Producer | None = None, scheme: QuantScheme = INT8) -> Tensor | None:
    group = group_of(rows, *weights, producer=producer)
    return SmoothQuantQuantizer().prepare(group, (scheme,) * len(weights)).smoothing_scale


@pytest.mark.parametrize(
    "scheme", [INT8, QuantScheme.parse("int8-tensor-a8"), QuantScheme.parse("int8-channel-asym-a8")], ids=str
)
def test_smoothing_rows_with_outlier_channels_beats_none(scheme: QuantScheme) -> None:
    rows, weights = crowded_rows(60.0, -90.0), (normal(16, 48), normal(24, 48, seed=1))
    scale = smoothed(rows, *weights, scheme=scheme)
    assert scale is not None
    for weight in weights:
        assert kernel_error(rows, weight, scale, scheme) < 0.3 * kernel_error(rows, weight, 1.0, scheme)


def test_the_smoothing_exponent_is_that_with_the_least_error_in_the_kernel() -> None:
    rows, weight = crowded_rows(60.0, -90.0), normal(16, 48) * torch.logspace(0, 1, 48)
    found = smoothed(rows, weight)
    assert found is not None
    inputs, weights = rows.abs().amax(0), weight.abs().amax(0)
    scales = [inputs ** (step / 20) / weights ** (1 - step / 20) for step in range(21)]
    errors = [kernel_error(rows, weight, scale) for scale in scales]
    assert kernel_error(rows, weight, found) == pytest.approx(min(errors), rel=0.02)


def test_channels_with_large_inputs_get_large_smoothing_scales() -> None:
    scale = smoothed(crowded_rows(60.0, -90.0), normal(16, 48))
    assert scale is not None
    large = torch.isin(torch.arange(48), torch.tensor([5, 10]))
    assert scale[large].min() > 2 * scale[~large].max()


def test_no_smoothing_where_nothing_helps() -> None:
    weight = torch.randint(-127, 128, (16, 48), generator=generator()).float().index_fill(1, torch.tensor([0]), 127)
    rows = torch.randint(-127, 128, (64, 48), generator=generator(1)).float()
    assert smoothed(rows, weight, scheme=QuantScheme.parse("int8-channel")) is None  # every code is exact
    assert smoothed(torch.zeros(8, 48), normal(6, 48)) is None
    assert smoothed(rows, torch.zeros(6, 48)) is None


def test_smoothing_gives_copies_of_one_producer_channel_one_scale() -> None:
    producer = Producer("linear", "v_proj", tuple(range(24)) * 2)
    scale = smoothed(crowded_rows(60.0, -90.0), normal(16, 48), producer=producer)
    assert scale is not None
    assert torch.equal(scale[:24], scale[24:])
    assert len(scale.unique()) > 1


@pytest.mark.parametrize("kind", WEIGHTS)
def test_smoothing_scales_are_finite_and_positive_whatever_the_weights(kind: str) -> None:
    prepared = contract.prepare(SmoothQuantQuantizer(), group_of(crowded_rows(60.0), WEIGHTS[kind]), (INT8,))
    assert prepared.smoothing_scale is None or len(prepared.smoothing_scale) == 48


def test_smoothing_is_the_same_every_time() -> None:
    first, second = (smoothed(crowded_rows(60.0), normal(6, 48)) for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_smoothquant_keeps_outliers_only_on_request_and_with_int8_activations() -> None:
    layer = layer_of(normal(6, 48), crowded_rows(60.0, -90.0))
    assert SmoothQuantQuantizer().quantize(layer, INT8).outliers is None
    assert columns(SmoothQuantQuantizer(max_outliers=4).quantize(layer, INT8)) == [5, 10]
    assert SmoothQuantQuantizer(max_outliers=4).quantize(layer, QuantScheme.parse("int8-channel")).outliers is None


@pytest.mark.parametrize("peaks", [(), (60.0, -90.0)], ids=["no outliers", "outliers"])
def test_columns_of_a_smoothed_weight_make_up_for_each_other_but_not_for_what_stays_in_float(peaks: tuple[float, ...]) -> None:
    rows = crowded_rows() @ (torch.eye(48) + 0.5 * torch.diag(torch.ones(47), 1))  # neighbours are correlated
    for column, peak in zip((5, 10), peaks, strict=False):
        rows[:, column] = peak
    layer = layer_of(normal(6, 48), rows)
    nearest, found = (SmoothQuantQuantizer(max_outliers=4, damp=damp).quantize(layer, INT8) for damp in (None, 0.5))
    assert columns(found) == columns(nearest) == ([5, 10] if peaks else [])
    assert torch.equal(found.scale, nearest.scale)
    rows[:, columns(found)] = 0

    def error(tensor: QuantizedTensor) -> float:
        return float((rows @ (tensor.dequantize() - layer.weight).T).square().sum())

    assert error(found) < 0.8 * error(nearest)
    assert torch.equal(found.q[:, columns(found)], nearest.q[:, columns(found)])


def test_a_damp_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="damp above 0"):
        SmoothQuantQuantizer(damp=0.0)


# awq

AWQ_SCHEMES = [QuantScheme.parse(text) for text in ("int4-g16-asym", "int4-g16", "int4-channel", "int4-channel-asym")]


def skewed_rows(width: int = 48) -> Tensor:
    """Inputs of which a few channels are a hundred times as large as most."""
    magnitude = torch.full((width,), 0.1)
    magnitude[::12] = 10.0
    return normal(256, width, seed=5) * magnitude


def output_error(rows: Tensor, weight: Tensor, dequantized: Tensor) -> float:
    return float((rows @ (dequantized - weight).T).square().mean())


def group_of(rows: Tensor, *weights: Tensor, producer: Producer | None = None) -> LinearGroup:
    stats = stats_of(rows)
    layers = tuple(Layer(f"layer{index}", "linear", weight, None, stats) for index, weight in enumerate(weights))
    return LinearGroup(layers, producer, stats)


@pytest.mark.parametrize("scheme", AWQ_SCHEMES, ids=str)
def test_awq_beats_round_to_nearest_on_the_output(scheme: QuantScheme) -> None:
    rows, weights = skewed_rows(), (normal(16, 48), normal(24, 48, seed=1))
    quantizer = AWQQuantizer()
    scale = quantizer.prepare(group_of(rows, *weights), (scheme, scheme)).smoothing_scale
    assert scale is not None
    for weight in weights:
        scaled = quantizer.quantize(layer_of(weight * scale, rows / scale), scheme).dequantize() / scale
        nearest = round_to_nearest(weight, scheme).dequantize()
        assert output_error(rows, weight, scaled) < 0.5 * output_error(rows, weight, nearest)


@pytest.mark.parametrize("scheme", AWQ_SCHEMES, ids=str)
def test_clipping_alone_lowers_the_output_error(scheme: QuantScheme) -> None:
    rows, weight = skewed_rows(), normal(64, 48)
    clipped = AWQQuantizer().quantize(layer_of(weight, rows), scheme).dequantize()
    assert output_error(rows, weight, clipped) < output_error(rows, weight, round_to_nearest(weight, scheme).dequantize())


def test_clipping_can_be_turned_off() -> None:
    scheme, layer = AWQ_SCHEMES[0], layer_of(normal(6, 48), skewed_rows())
    unclipped = AWQQuantizer(min_clip=1.0).quantize(layer, scheme).dequantize()
    assert torch.equal(unclipped, round_to_nearest(layer.weight, scheme).dequantize())
    assert not torch.equal(AWQQuantizer().quantize(layer, scheme).dequantize(), unclipped)


@pytest.mark.parametrize("scheme", AWQ_SCHEMES, ids=str)
def test_the_scale_is_the_one_of_the_papers_family_with_the_least_output_error(scheme: QuantScheme) -> None:
    rows, weight = skewed_rows(), normal(16, 48) * torch.logspace(0, 1, 48)
    magnitude = rows.square().mean(0).sqrt()
    largest = affine.grouped(weight.abs(), scheme).amax(-1, keepdim=True)
    share = (affine.grouped(weight.abs(), scheme) / largest).reshape(weight.shape).mean(0)
    powers = [magnitude**exponent / (share ** (1 - exponent) + 1e-4) for exponent in torch.linspace(0, 1, 11).tolist()]
    scales = [power / (power.max() * power.min()).sqrt() for power in powers]
    errors = [output_error(rows, weight, round_to_nearest(weight * scale, scheme).dequantize() / scale) for scale in scales]
    found = AWQQuantizer().prepare(group_of(rows, weight), (scheme,)).smoothing_scale
    assert found is not None
    assert torch.allclose(found, scales[errors.index(min(errors))], rtol=1e-4)


def test_larger_inputs_get_larger_scales() -> None:
    scale = AWQQuantizer().prepare(group_of(skewed_rows(), normal(16, 48)), (AWQ_SCHEMES[0],)).smoothing_scale
    assert scale is not None
    large = torch.arange(48) % 12 == 0
    assert scale[large].min() > 2 * scale[~large].max()


def test_no_scale_where_none_helps() -> None:
    weight = torch.arange(-8, 8).repeat(4, 3).float()  # int4 holds it exactly
    assert AWQQuantizer().prepare(group_of(skewed_rows(), weight), (QuantScheme.parse("int4-g16"),)).smoothing_scale is None


def test_inputs_that_are_copies_of_one_producer_channel_get_one_scale() -> None:
    channels = tuple(range(24)) * 2
    producer = Producer("linear", "v_proj", channels)
    group = group_of(skewed_rows(), normal(16, 48), producer=producer)
    scale = AWQQuantizer().prepare(group, (AWQ_SCHEMES[0],)).smoothing_scale
    assert scale is not None
    assert torch.equal(scale[:24], scale[24:])
    assert len(scale.unique()) > 1


def test_the_scale_weighs_each_layer_with_its_own_scheme() -> None:
    """An int8 layer has little to gain, so the int4 one decides on the exponent."""
    rows, first, second = skewed_rows(), normal(16, 48), normal(16, 48, seed=1) * torch.logspace(0, 1, 48).flip(0)
    int4, int8 = QuantScheme.parse("int4-g16"), QuantScheme.parse("int8-g16")
    mixed = AWQQuantizer().prepare(group_of(rows, first, second), (int4, int8)).smoothing_scale
    other = AWQQuantizer().prepare(group_of(rows, first, second), (int8, int4)).smoothing_scale
    assert mixed is not None
    assert other is not None

    def error(weight: Tensor, scale: Tensor) -> float:
        return output_error(rows, weight, round_to_nearest(weight * scale, int4).dequantize() / scale)

    assert error(first, mixed) < error(first, other)
    assert error(second, other) < error(second, mixed)


@pytest.mark.parametrize("dead", [slice(0, 5), slice(0, 48)], ids=["some", "all"])
def test_inputs_that_are_always_zero_do_no_harm(dead: slice) -> None:
    rows = skewed_rows()
    rows[:, dead] = 0
    group = contract.prepare(AWQQuantizer(), group_of(rows, normal(16, 48)), (AWQ_SCHEMES[0],))
    assert (group.smoothing_scale is None) == (dead.stop == 48)
    tensor = contract.quantize(AWQQuantizer(), layer_of(normal(16, 48), rows), AWQ_SCHEMES[0])
    assert torch.isfinite(tensor.dequantize()).all()


def test_without_statistics_awq_rounds_to_nearest_and_scales_nothing() -> None:
    layer = replace(layer_of(normal(6, 48)), stats=None)
    assert AWQQuantizer().prepare(LinearGroup((layer,)), (AWQ_SCHEMES[0],)).smoothing_scale is None
    quantized = AWQQuantizer().quantize(layer, AWQ_SCHEMES[0]).dequantize()
    assert torch.equal(quantized, round_to_nearest(layer.weight, AWQ_SCHEMES[0]).dequantize())
