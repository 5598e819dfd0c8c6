"""GPTQ: against the algorithm written down plainly, and what its options do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_quantizers import WEIGHTS
from torch import Tensor

from qconvert.ir import affine
from qconvert.ir.layer import CalibrationStats, Layer, LinearGroup
from qconvert.ir.scheme import QuantScheme
from qconvert.plugin.host import contract
from qconvert.plugin.observer import Gram
from qconvert.plugin.quantizer import round_to_nearest
from qconvert.quantizers.awq import AWQQuantizer
from qconvert.quantizers.gptq import GPTQQuantizer

SCHEMES = [QuantScheme.parse(text) for text in ("int4-g16-asym", "int4-g16", "int4-channel", "int8-channel-asym")]
WIDTH = 160  # more than one block of columns, the last one smaller


def correlated_rows(width: int = WIDTH) -> Tensor:
    """Inputs whose channels are mixtures of a few."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(400, 24, generator=generator) @ torch.randn(24, width, generator=generator) + 0.1 * torch.randn(
        400, width, generator=generator
    )


def layer_of(rows: Tensor, out_features: int = 12) -> Layer:
    gram = Gram()
    gram.update(rows, torch.ones(len(rows)))
    weight = torch.randn(out_features, rows.shape[1], generator=torch.Generator().manual_seed(0))
    return Layer("layer", "linear", weight, None, CalibrationStats(len(rows), {"gram": gram.finalize()}))


def output_error(rows: Tensor, layer: Layer, weight: Tensor) -> float:
    return float((rows @ (weight - layer.weight).T).square().mean())


def plain_gptq(layer: Layer, scheme: QuantScheme, damp: float, order: list[int]) -> Tensor:
    """Column after column with the inverse Hessian of what is left, and no factorization (the paper's equations 2 and 3)."""
    assert layer.stats is not None
    gram = layer.stats.values["gram"].double()
    hessian = gram + damp * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    scale, zero_point = affine.choose_qparams(layer.weight, scheme)
    weight = layer.weight.double().clone()
    rest = list(order)
    quantized = torch.empty_like(layer.weight)
    while rest:
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        column = rest[0]
        group = column // scheme.group_size(weight.shape[1])
        zero = 0 if zero_point is None else zero_point[:, group]
        low, high = scheme.code_range
        code = (torch.round(weight[:, column] / scale[:, group]) + zero).clamp(low, high)
        quantized[:, column] = ((code - zero) * scale[:, group]).float()
        error = (weight[:, column] - quantized[:, column]) / inverse[0, 0]
        weight[:, rest] -= error[:, None] * inverse[0]
        rest.pop(0)
    return quantized


@pytest.mark.parametrize("wide", [False, True], ids=["ordinary", "wide"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act order"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_is_the_papers_update(scheme: QuantScheme, act_order: bool, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qconvert.quantizers.compensation.WIDE", 0 if wide else WIDTH)
    rows = correlated_rows()
    layer = layer_of(rows)
    assert layer.stats is not None
    energy = layer.stats.values["gram"].diagonal()
    order = energy.argsort(descending=True, stable=True).tolist() if act_order else list(range(WIDTH))
    expected = plain_gptq(layer, scheme, 0.1, order)
    quantizer = GPTQQuantizer(damp=0.1, act_order=act_order, min_clip=1.0)
    found = contract.quantize(quantizer, layer, scheme).dequantize()
    # float32 decides a few ties otherwise, and what follows them.
    assert (found - expected).abs().gt(1e-4).float().mean() < 0.02
    assert output_error(rows, layer, found) == pytest.approx(output_error(rows, layer, expected), rel=0.02)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_errors_are_made_up_for(scheme: QuantScheme) -> None:
    rows = correlated_rows()
    layer = layer_of(rows)
    found = GPTQQuantizer().quantize(layer, scheme).dequantize()
    clipped = AWQQuantizer().quantize(layer, scheme).dequantize()
    assert output_error(rows, layer, found) < 0.5 * output_error(rows, layer, clipped)


def test_without_correlation_it_rounds_to_nearest() -> None:
    layer = replace(layer_of(torch.eye(48)), stats=CalibrationStats(48, {"gram": torch.eye(48)}))
    scheme = QuantScheme.parse("int4-g16")
    found = GPTQQuantizer(min_clip=1.0).quantize(layer, scheme)
    assert torch.equal(found.q, round_to_nearest(layer.weight, scheme).q)


@pytest.mark.parametrize("dead", [slice(0, 5), slice(0, 48)], ids=["some", "all"])
def test_inputs_that_are_always_zero_do_no_harm(dead: slice) -> None:
    rows = correlated_rows(48)
    rows[:, dead] = 0
    tensor = contract.quantize(GPTQQuantizer(), layer_of(rows), QuantScheme.parse("int4-g16"))
    assert torch.isfinite(tensor.dequantize()).all()


def test_the_smoothing_scale_is_awqs_unless_it_is_turned_off() -> None:
    layer = layer_of(correlated_rows(48) * torch.logspace(-1, 1, 48))
    group, schemes = LinearGroup((layer,), None, layer.stats), (QuantScheme.parse("int4-g16"),)
    expected = AWQQuantizer().prepare(group, schemes).smoothing_scale
    found = GPTQQuantizer().prepare(group, schemes).smoothing_scale
    assert expected is not None
    assert found is not None
    assert torch.equal(found, expected)
    assert GPTQQuantizer(scale=False).prepare(group, schemes).smoothing_scale is None


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_odd_weights_do_not_upset_the_compensation(kind: str, scheme: QuantScheme) -> None:
    weight = WEIGHTS[kind]
    rows = correlated_rows(weight.shape[1])
    if weight.shape[1] % scheme.group_size(weight.shape[1]):
        pytest.skip("the group does not divide this width")
    layer = replace(layer_of(rows), weight=weight)
    found = contract.quantize(GPTQQuantizer(), layer, scheme).dequantize()
    nearest = round_to_nearest(weight, scheme).dequantize()
    assert torch.isfinite(found).all()
    assert (found[weight.abs().amax(1) == 0] == 0).all()
    small = weight.double()
    assert ((found - small) @ rows.double().T).norm() <= 1.01 * ((nearest - small) @ rows.double().T).norm()


@pytest.mark.parametrize("options", [{"damp": 0.0}, {"grid": 0}, {"min_clip": 1.5}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        GPTQQuantizer(**options)  # type: ignore[arg-type]
