"""Every scheme on every kind of layer: what the exported graph computes, and with which ops."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from calibrate_models import model_of
from exporting import (
    integer_products,
    lossless_rows,
    nearest,
    parity,
    publish,
    quantize_nearest,
    whole_numbers,
    without_largest,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qconvert.ir.artifact import GRAPH
from qconvert.ir.model import Model
from qconvert.ir.quantized import Outliers
from qconvert.ir.scheme import PerGroup, QuantScheme
from qconvert.ir.template import Template
from qconvert.ort.compare import largest_difference
from qconvert.ort.session import file_session
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.trace import trace

EXACT = 2e-6  # float32 sums in another order

WEIGHT_ONLY = [
    f"int{bits}-{granularity}{asym}"
    for bits in (4, 8)
    for granularity in ("tensor", "channel", "g16")
    for asym in ("", "-asym")
]
INT8_ACTIVATIONS = [f"int8-{granularity}{asym}-a8" for granularity in ("tensor", "channel") for asym in ("", "-asym")]
SCHEMES = WEIGHT_ONLY + INT8_ACTIVATIONS


class Layers(nn.Module):
    """Every kind of layer; widths 27, 36 and 24 are no multiple of any kernel's block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv27 = nn.Conv2d(3, 8, 3)
        self.conv32 = nn.Conv2d(8, 4, 2, bias=False)
        self.fc36 = nn.Linear(36, 64)
        self.plain64 = nn.Linear(64, 48, bias=False)
        self.conv1d48 = Conv1D(24, 48)
        self.fc24 = nn.Linear(24, 64, bias=False)
        self.left = nn.Linear(64, 8)
        self.right = nn.Linear(64, 8)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.conv32(torch.relu(self.conv27(image))).flatten(1)
        hidden = self.conv1d48(torch.tanh(self.plain64(torch.tanh(self.fc36(hidden)))))
        hidden = self.fc24(hidden)
        return self.left(hidden) * self.right(hidden)  # type: ignore[no-any-return]


@cache
def layers() -> tuple[Model, Template]:
    torch.manual_seed(0)
    model = model_of(Layers(), example_inputs={"image": torch.randn(3, 3, 6, 6)}, input_names=("image",))
    return model, trace(model)


@pytest.mark.parametrize("text", SCHEMES)
def test_every_kind_of_layer_agrees_with_its_dequantized_weights(text: str, tmp_path: Path) -> None:
    """As `verify` measures it: the graph with float activations, then each int8 cluster alone."""
    scheme = QuantScheme.parse(text)
    model, template = layers()
    tensors = quantize_nearest(model, lambda name, weight: scheme if divides(scheme, weight) else None)
    artifact = publish(model, template, tensors, tmp_path / "out")
    assert parity(artifact) < 1e-5
    assert len(tensors) == (5 if isinstance(scheme.granularity, PerGroup) else 8)


def divides(scheme: QuantScheme, weight: Tensor) -> bool:
    return weight.shape[1] % scheme.group_size(weight.shape[1]) == 0


# --- exactly, without any of the verifier's code: weights and activations that are whole numbers lose nothing ---

RANGES = {(8, True): (-127, 127), (4, True): (-8, 7), (8, False): (-100, 155), (4, False): (-5, 10)}


class Pair(nn.Module):
    """Two layers that read the same input."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.other(x)


def pair(one: nn.Module, other: nn.Module, x: Tensor) -> tuple[Model, Template]:
    model = model_of(Pair(one, other), example_inputs={"x": x}, input_names=("x",))
    return model, trace(model)


def outputs(artifact: ArtifactReader, x: Tensor) -> list[Any]:
    """What the published graph computes, kernels at full speed."""
    found: list[Any] = file_session(artifact.folder / GRAPH).run(None, {"x": x.numpy()})
    return found


@cache
def linear_and_conv1d(width: int) -> tuple[Model, Template]:
    return pair(nn.Linear(width, 8), Conv1D(8, width), torch.zeros(2, width))


# A width of 40 is no multiple of a kernel's block, so no group divides it.
CASES = [(text, width) for text in SCHEMES for width in (64, 40) if width == 64 or "-g" not in text]


@pytest.mark.parametrize(("text", "width"), CASES)
def test_whole_numbers_come_out_exactly(text: str, width: int, tmp_path: Path) -> None:
    scheme = QuantScheme.parse(text)
    model, template = linear_and_conv1d(width)
    low, high = RANGES[scheme.bits, scheme.symmetric]
    names = ("one", "other")
    weights = {name: without_largest(whole_numbers((8, width), low, high, seed)) for seed, name in enumerate(names)}
    x = lossless_rows((5, width), scheme, seed=9)
    artifact = publish(model, template, {name: nearest(weight, scheme) for name, weight in weights.items()}, tmp_path / "out")
    for name, found in zip(weights, outputs(artifact, x), strict=True):
        expected = x @ weights[name].T + model.read(f"{name}.bias")
        assert largest_difference(found, expected.numpy()) < EXACT, name


@pytest.mark.parametrize("text", ["int8-channel", "int4-g16-asym", "int4-tensor-asym", "int8-channel-a8"])
def test_convolutions_are_torchs_on_dequantized_weights(text: str, tmp_path: Path) -> None:
    scheme = QuantScheme.parse(text)
    torch.manual_seed(1)
    grouped = nn.Conv2d(8, 6, (2, 4), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
    plain = nn.Conv2d(8, 4, 3, bias=False)
    x = torch.randn(2, 8, 9, 9)
    model, template = pair(grouped, plain, x)
    tensors = {"one": nearest(grouped.weight.detach().flatten(1), scheme)}
    if not isinstance(scheme.granularity, PerGroup):
        tensors["other"] = nearest(plain.weight.detach().flatten(1), scheme)
    artifact = publish(model, template, tensors, tmp_path / "out")
    for name, conv, found in zip(("one", "other"), (grouped, plain), outputs(artifact, x), strict=True):
        if name in tensors:
            conv.weight.data = tensors[name].dequantize().reshape(conv.weight.shape)
        assert largest_difference(found, conv(x).detach().numpy()) < EXACT, name


# --- outliers and smoothing scales ---


def ops(artifact: ArtifactReader) -> list[str]:
    return [node.op_type for node in onnx.load(artifact.folder / GRAPH, load_external_data=False).graph.node]


def test_outlier_columns_are_float_and_neither_stretch_the_rows_nor_count_twice(tmp_path: Path) -> None:
    model, template = pair(nn.Linear(64, 8), nn.Linear(64, 8), torch.zeros(2, 64))
    columns = torch.tensor([3, 40])
    scheme = QuantScheme.parse("int8-channel-a8")
    x = lossless_rows((5, 64), scheme, seed=9)
    x[:, columns] = torch.tensor([1000.25, -3000.5])
    tensors, expected = {}, {}
    for seed, name in enumerate(("one", "other")):
        weight = without_largest(whole_numbers((8, 64), -127, 127, seed))
        weight[:, columns] = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))
        tensors[name] = dataclasses.replace(nearest(weight, scheme), outliers=Outliers(columns, weight[:, columns]))
        expected[name] = x @ weight.T + model.read(f"{name}.bias")
    artifact = publish(model, template, tensors, tmp_path / "out")
    for name, found in zip(expected, outputs(artifact, x), strict=True):
        assert largest_difference(found, expected[name].numpy()) < EXACT, name
    assert ops(artifact).count("ReduceMax") == 1  # rows are quantized once for both
    assert parity(artifact) < 1e-5


@pytest.mark.parametrize("text", ["int4-g16", "int8-channel-asym", "int8-channel-a8"])
def test_an_smoothing_scale_that_could_not_be_folded_is_one_mul_for_all_that_share_it(text: str, tmp_path: Path) -> None:
    scheme = QuantScheme.parse(text)
    model, template = pair(nn.Linear(64, 8), nn.Linear(64, 8), whole_numbers((2, 64), -9, 9))
    smoothing_scale = 2.0 ** (torch.arange(64) % 5 - 2)
    x = lossless_rows((5, 64), scheme, seed=9) * smoothing_scale
    tensors, expected = {}, {}
    for seed, name in enumerate(("one", "other")):
        scaled = without_largest(whole_numbers((8, 64), *RANGES[scheme.bits, scheme.symmetric], seed))
        tensors[name] = dataclasses.replace(nearest(scaled, scheme), smoothing_scale=smoothing_scale)
        expected[name] = x @ (scaled / smoothing_scale).T + model.read(f"{name}.bias")
    artifact = publish(model, template, tensors, tmp_path / "out")
    for name, found in zip(expected, outputs(artifact, x), strict=True):
        assert largest_difference(found, expected[name].numpy()) < EXACT, name
    # The row form has one more per input, and one per layer.
    assert ops(artifact).count("Mul") == (1 if not scheme.activations else 4)
    assert parity(artifact) < 1e-5


def test_a_row_of_zeros_stays_zero(tmp_path: Path) -> None:
    model, template = linear_and_conv1d(64)
    tensors = quantize_nearest(model, lambda name, weight: QuantScheme.parse("int8-channel-a8"))
    artifact = publish(model, template, tensors, tmp_path / "out")
    x = whole_numbers((2, 64), -127, 127)
    x[1] = 0
    one, other = outputs(artifact, x)
    assert torch.equal(torch.from_numpy(one[1]), model.read("one.bias"))
    assert torch.equal(torch.from_numpy(other[1]), model.read("other.bias"))


@pytest.mark.parametrize(("function", "zero_point"), [(nn.ReLU(), 0), (nn.GELU(), 24), (nn.Tanh(), 128)], ids=str)
def test_most_codes_go_to_what_an_activation_function_gives(function: nn.Module, zero_point: int, tmp_path: Path) -> None:
    inputs = {"input": torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 3}
    model = model_of(nn.Sequential(function, nn.Linear(64, 8)), example_inputs=inputs, input_names=("input",))
    tensors = quantize_nearest(model, lambda name, weight: QuantScheme.parse("int8-channel-a8"))
    template = trace(model)
    artifact = publish(model, template, tensors, tmp_path / "out")
    assert parity(artifact) < 1e-5
    graph = onnx.load(artifact.folder / GRAPH, load_external_data=False).graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer if each.name.startswith("qconvert/")}
    products = integer_products(graph)
    assert [constants[product.input[4]] for product in products] == [zero_point] * 2  # with signed weights, and unsigned ones
    assert template.groups[0].made_by == {0: "Relu", 24: "Gelu", 128: "Tanh"}[zero_point]


# --- which kernels ---


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("int4-g16", 64, {"bits": 4, "block_size": 16, "K": 64, "N": 8, "accuracy_level": 4}),
        ("int8-channel", 64, {"bits": 8, "block_size": 64, "K": 64, "N": 8, "accuracy_level": 4}),
        ("int8-tensor-asym", 40, {"bits": 8, "block_size": 16, "K": 40, "N": 8, "accuracy_level": 4}),
    ],
)
def test_weight_only_linears_are_one_matmul_nbits(text: str, width: int, expected: dict[str, int], tmp_path: Path) -> None:
    model, template = linear_and_conv1d(width)
    tensors = quantize_nearest(model, lambda name, weight: QuantScheme.parse(text))
    artifact = publish(model, template, tensors, tmp_path / "out")
    nodes = onnx.load(artifact.folder / GRAPH, load_external_data=False).graph.node
    kernels = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert len(kernels) == 2
    assert {attribute.name: attribute.i for attribute in kernels[0].attribute} == expected
    assert {node.op_type for node in nodes} <= {"MatMulNBits", "Cast"}


def test_layers_that_are_not_quantized_stay_plain_float_ops(tmp_path: Path) -> None:
    model, template = linear_and_conv1d(64)
    scheme = QuantScheme.parse("int8-channel")
    artifact = publish(
        model, template, quantize_nearest(model, lambda name, _: scheme if name == "one" else None), tmp_path / "out"
    )
    assert sorted(set(ops(artifact)) - {"Cast"}) == ["Add", "MatMul", "MatMulNBits"]
    x = torch.randn(3, 64)
    expected = x @ model.read("other.weight") + model.read("other.bias")
    assert largest_difference(outputs(artifact, x)[1], expected.numpy()) < EXACT
    assert artifact.layer("one").q.shape == (8, 64)
