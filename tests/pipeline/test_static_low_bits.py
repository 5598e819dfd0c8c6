"""Static activations of 4 bits, and beside int4 weights: what the graph computes, against the same in torch."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import static_modules
import torch
from tiny_models import tiny_bert
from torch import Tensor, nn

from qconvert import Recipe, Report, convert
from qconvert.errors import UsageError
from qconvert.ir.artifact import GRAPH
from qconvert.ir.progress import silent
from qconvert.ir.scheme import QuantScheme
from qconvert.pipeline import preflight, preparation
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.storage.reader import read_index

DIGITS = f"module:{static_modules.__file__}:classifier"
RESIDUAL = f"module:{static_modules.__file__}:residual"
FEW = {"calibration": {"samples": 16, "length": 32}, "evaluation": {"samples": 16, "length": 32}}
SCHEMES = (
    *("int4-channel-a4-static", "int4-g16-asym-a4-static-sym", "int8-channel-a4-static"),
    *("int4-g32-a8-static", "int4-channel-a16-static"),
)


def run(model: str | Path, output: Path, scheme: str, **settings: Any) -> tuple[Report, Recipe]:
    recipe = Recipe.from_settings({"model": str(model), "output": str(output), "scheme": scheme, **FEW, **settings})
    return convert(recipe), recipe


class Coded(nn.Module):
    """A linear layer on the codes of its input, with a dequantized weight."""

    def __init__(self, layer: nn.Linear, weight: Tensor, value: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.value = copy.deepcopy(layer), value
        self.layer.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        scale, zero_point = self.value["scale"], self.value["zero_point"]
        codes = (torch.round(x / torch.tensor(scale)) + zero_point).clamp(0, 2 ** self.value["bits"] - 1)
        return self.layer((codes - zero_point) * torch.tensor(scale))  # type: ignore[no-any-return]


def in_torch(recipe: Recipe, network: nn.Sequential) -> nn.Sequential:
    """The network with what the artifact says of weights and ranges."""
    job = preparation.reading_job(recipe, preflight.plugins_of(recipe), silent)
    artifact = ArtifactReader(recipe.output, job.model, job.plan, read_index(recipe.output))
    values = json.loads((recipe.output / "qconvert.json").read_text(encoding="utf-8"))["activations"]["values"]
    ranges = {layer: value for value in values for layer in value["layers"]}
    layers = [
        Coded(layer, artifact.layer(str(place)).dequantize(), ranges[str(place)]) if isinstance(layer, nn.Linear) else layer
        for place, layer in enumerate(network)
    ]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_network_of_linears_computes_what_torch_computes_with_its_codes(scheme: str, tmp_path: Path) -> None:
    """ONNX Runtime is kept from quantizing float weights by itself, which it does where codes come in and go out."""
    report, recipe = run(DIGITS, tmp_path / "out", scheme)
    assert report.passed
    bits = QuantScheme.parse(scheme).activations.bits  # type: ignore[union-attr]
    assert report.activations is not None
    assert {value.bits for value in report.activations.values} == {bits}
    network = static_modules.trained_digits()
    assert isinstance(network, nn.Sequential)
    pixels, _ = static_modules.digits()
    emulated = in_torch(recipe, network)
    with torch.no_grad():
        expected = emulated(pixels[1200:]).numpy()
    session = onnxruntime.InferenceSession(tmp_path / "out" / GRAPH, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: pixels[1200:].numpy()})[0]
    off = np.abs(found - expected).max(1) / np.abs(expected).max()
    assert np.median(off) < 5e-5  # biases beside int8 weights are rounded to int32
    assert (off > 1e-4).mean() < 0.05  # a value on the border of two codes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_convolutions_with_batch_norms_are_proven_too(scheme: str, tmp_path: Path) -> None:
    report, _ = run(RESIDUAL, tmp_path / "out", scheme)
    assert report.passed
    assert report.fidelity[0].cosine is not None
    assert report.fidelity[0].cosine > (0.9 if "a4" in scheme else 0.99)


@pytest.mark.parametrize("scheme", ["int4-channel-a4-static", "int8-channel-a4-static", "int4-g32-a8-static"])
def test_an_encoder_is_proven_too(scheme: str, tmp_path: Path) -> None:
    report, _ = run(tiny_bert(tmp_path / "source"), tmp_path / "out", scheme, layout="onnx")
    assert report.passed


def test_weights_of_4_bits_take_half_the_bytes_of_8(tmp_path: Path) -> None:
    four, _ = run(DIGITS, tmp_path / "four", "int4-channel-a4-static", verify=False)
    eight, _ = run(DIGITS, tmp_path / "eight", "int8-channel-a4-static", verify=False)
    assert four.size.ratio <= 0.15
    assert 0.25 < eight.size.ratio <= 0.30


@pytest.mark.parametrize("ranges", ["min-max", "moving-average", "percentile", "mse", "kl"])
def test_every_estimator_finds_ranges_for_16_codes(ranges: str, tmp_path: Path) -> None:
    report, _ = run(DIGITS, tmp_path / "out", "int4-channel-a4-static", ranges={"estimator": ranges})
    assert report.passed
    assert report.fidelity[0].cosine is not None
    assert report.fidelity[0].cosine > 0.9


@pytest.mark.parametrize("scheme", ["int8-g32-a4-static", "int8-channel-asym-a4-static", "int4-channel-a8"])
def test_what_has_no_graph_is_refused(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        run(DIGITS, tmp_path / "out", scheme)
    assert refused.value.code == "QC-PLAN-001"
