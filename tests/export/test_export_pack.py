"""Query, key and value as one linear over the same bytes, and gate and up: when it is done, and what it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
import transformers
from calibrate_models import model_of
from exporting import integer_products, parity, publish, quantize_nearest
from torch import Tensor, nn
from trace_models import DECODER

from qconvert.ir.artifact import GRAPH
from qconvert.ir.model import Model
from qconvert.ir.quantized import Outliers
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.template import Template
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.trace import trace

EXACT = 5e-6
SETTINGS = {**DECODER, "num_hidden_layers": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SETTINGS)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SETTINGS)),  # with biases
}


@cache
def traced(name: str) -> tuple[Model, Template]:
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    for parameter, value in module.named_parameters():
        if parameter.endswith("bias"):
            nn.init.normal_(value)
    blocks = tuple(f"model.layers.{index}" for index in range(SETTINGS["num_hidden_layers"]))
    model = model_of(module, "causal-lm", blocks=blocks, input_names=("input_ids", "attention_mask"))
    return model, trace(model)


def artifact(name: str, output: Path, scheme_of: Callable[[str], str | None], outlier_columns: int = 0) -> ArtifactReader:
    model, template = traced(name)

    def scheme(layer: str, weight: Tensor) -> QuantScheme | None:
        text = scheme_of(layer) if layer.startswith("model.layers") else None
        return None if text is None else QuantScheme.parse(text)

    tensors = quantize_nearest(model, scheme)
    if outlier_columns:
        columns = torch.arange(outlier_columns) * 5 + 1
        for layer, tensor in tensors.items():
            outliers = Outliers(columns, model.read(f"{layer}.weight").float()[:, columns])
            tensors[layer] = replace(tensor, outliers=outliers)
    return publish(model, template, tensors, output)


def ops(found: ArtifactReader) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(found.folder / GRAPH, load_external_data=False).graph.node)


def attention_inputs(found: ArtifactReader) -> list[int]:
    """How many of query, key and value every attention is given."""
    nodes = onnx.load(found.folder / GRAPH, load_external_data=False).graph.node
    return [sum(map(bool, node.input[:3])) for node in nodes if node.op_type == "GroupQueryAttention"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "scheme", ["int4-g16", "int4-g16-asym", "int4-channel", "int8-g16", "int8-channel-a8", "int8-tensor-asym-a8"]
)
def test_packed_linears_compute_what_they_did_apart(name: str, scheme: str, tmp_path: Path) -> None:
    found = artifact(name, tmp_path / "out", lambda layer: scheme)
    assert attention_inputs(found) == [1, 1]
    assert ops(found)["Split"] == 2  # gate and up
    assert parity(found) < EXACT


@pytest.mark.parametrize("name", MODELS)
def test_outlier_columns_are_packed_too(name: str, tmp_path: Path) -> None:
    found = artifact(name, tmp_path / "out", lambda layer: "int8-channel-a8", outlier_columns=3)
    assert attention_inputs(found) == [1, 1]
    graph = onnx.load(found.folder / GRAPH, load_external_data=False).graph
    # query, key and value; out; gate and up; down; each with signed weights, and unsigned ones
    assert len(integer_products(graph)) == 2 * (1 + 1 + 1 + 1) * 2
    assert parity(found) < EXACT


@pytest.mark.parametrize("scheme", ["int4-g16", "int8-channel-a8"])
def test_weights_that_lie_together_are_read_where_they_lie(scheme: str, tmp_path: Path) -> None:
    assert ops(artifact("llama", tmp_path / "out", lambda layer: scheme))["Concat"] == 0


@pytest.mark.parametrize("other", ["int8-g16", "int4-channel"])
def test_linears_that_are_lowered_differently_stay_apart(other: str, tmp_path: Path) -> None:
    found = artifact("llama", tmp_path / "out", lambda layer: other if layer.endswith(("k_proj", "up_proj")) else "int4-g16")
    assert attention_inputs(found) == [3, 3]
    assert ops(found)["Split"] == 0
    assert parity(found) < EXACT


def test_a_float_linear_stays_apart_from_those_that_read_the_same(tmp_path: Path) -> None:
    """Query and value are one product; up is alone."""
    found = artifact("llama", tmp_path / "out", lambda layer: None if layer.endswith(("k_proj", "gate_proj")) else "int4-g16")
    assert attention_inputs(found) == [3, 3]
    assert (ops(found)["MatMulNBits"], ops(found)["Split"]) == (2 * 4, 2)
    assert parity(found) < EXACT
