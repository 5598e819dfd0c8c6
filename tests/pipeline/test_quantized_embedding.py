"""Quantized embeddings and the heads that share them, from plan to verified folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from calibrate_models import model_of
from exporting import nearest, parity, publish
from safetensors import safe_open
from tiny_models import tiny_bert, tiny_llama
from torch import Tensor, nn

from qconvert.ir.artifact import GRAPH, WEIGHTS
from qconvert.ir.report import Report
from qconvert.ir.scheme import QuantScheme
from qconvert.ort.compare import largest_difference
from qconvert.ort.session import file_session
from qconvert.pipeline import conversion
from qconvert.recipe import Recipe
from qconvert.trace import trace


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    (root / "text.txt").write_text("".join(f"Sentence {n} has {n * n} words, {n % 7} of them short.\n" for n in range(60)))
    tiny_llama(root / "tied")
    tiny_llama(root / "untied", tie=False)
    tiny_bert(root / "bert")
    return root


def convert(source: Path, output: Path, rules: dict[str, str], **settings: Any) -> Report:
    data = {"source": str(source.parent / "text.txt"), "samples": 4, "length": 32}
    listed = [{"pattern": pattern, "scheme": scheme} for pattern, scheme in rules.items()]
    recipe = {"model": str(source), "output": str(output), "calibration": data, "evaluation": data, "rules": listed}
    return conversion.convert(Recipe.from_settings({**recipe, **settings}))


def tensors(folder: Path) -> set[str]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return set(file.keys())


def graph_of(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / GRAPH, load_external_data=False).graph


def where(graph: onnx.GraphProto, name: str) -> dict[str, str]:
    """File, offset and length of an initializer."""
    found = next(each for each in graph.initializer if each.name == name)
    return {entry.key: entry.value for entry in found.external_data}


@pytest.mark.parametrize(
    ("quantizer", "scheme"),
    [
        ("per-channel", "int4-g32"),
        ("awq", "int4-g32-asym"),
        ("per-channel", "int8-channel"),
        ("zero-point", "int8-g32-asym"),
        ("per-channel", "int8-channel-a8"),
        ("zero-point", "int8-tensor-asym-a8"),
        ("llm-int8", "int8-channel-a8"),
    ],
)
def test_a_tied_pair_is_one_tensor_that_every_loader_reads(
    quantizer: str, scheme: str, sources: Path, tmp_path: Path, quick: None
) -> None:
    report = convert(sources / "tied", tmp_path / "out", {"lm_head": scheme}, quantizer=quantizer, scheme=scheme)
    assert {part.target: part.status for part in report.parity} == {
        "cpu": "passed",
        "transformers": "passed",
        "float": "passed",
    }
    suffix = "weight" if scheme.endswith("-a8") else "weight_packed"
    assert {f"model.embed_tokens.{suffix}", "model.embed_tokens.weight_scale"} <= tensors(tmp_path / "out")
    assert not any(name.startswith("lm_head") for name in tensors(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"]
    (group,) = config["quantization_config"]["config_groups"].values()
    assert (group["targets"], config["quantization_config"]["dequantize"]) == (["Linear", "Embedding"], True)


def test_with_int8_activations_too_the_embedding_and_the_head_read_the_same_bytes(sources: Path, tmp_path: Path) -> None:
    convert(sources / "tied", tmp_path / "out", {"lm_head": "int8-channel-a8"}, verify=False)
    graph = graph_of(tmp_path / "out")
    readers = [node.op_type for node in graph.node if "model.embed_tokens.weight" in node.input]
    assert sorted(readers) == ["Gather", "Transpose"]
    assert where(graph, "model.embed_tokens.weight/unsigned") == where(graph, "model.embed_tokens.weight")


def test_the_embedding_and_the_head_read_the_same_bytes(sources: Path, tmp_path: Path) -> None:
    convert(sources / "tied", tmp_path / "out", {"lm_head": "int4-g32"}, scheme="int4-g32", verify=False)
    graph = graph_of(tmp_path / "out")
    (lookup,) = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    head = next(node for node in graph.node if "logits" in node.output)
    assert head.op_type == "MatMulNBits"
    assert where(graph, lookup.input[0]) == where(graph, head.input[1])
    assert lookup.input[2] == head.input[2]


def test_an_embedding_and_an_untied_head_may_differ_in_the_onnx_layout(sources: Path, tmp_path: Path, quick: None) -> None:
    rules = {"lm_head": "int8-channel", "model.embed_tokens": "int4-g16-asym"}
    report = convert(sources / "untied", tmp_path / "out", rules, quantizer="awq", layout="onnx")
    assert [(part.target, part.status) for part in report.parity] == [("cpu", "passed"), ("float", "passed")]
    schemes = {layer.name: layer.scheme for layer in report.layers}
    assert (schemes["lm_head"], schemes["model.embed_tokens"]) == ("int8-channel", "int4-g16-asym")


def test_an_untied_head_may_stay_float(sources: Path, tmp_path: Path, quick: None) -> None:
    report = convert(sources / "untied", tmp_path / "out", {"model.embed_tokens": "int4-g32"}, scheme="int4-g32")
    assert report.passed
    assert "lm_head.weight" in tensors(tmp_path / "out")


@pytest.mark.parametrize(("scheme", "layout"), [("int8-channel-a8", "transformers"), ("int4-g16", "onnx")])
def test_an_encoders_embeddings_go_with_int8_activations(
    scheme: str, layout: str, sources: Path, tmp_path: Path, quick: None
) -> None:
    whole = convert(sources / "bert", tmp_path / "whole", {}, verify=False)
    report = convert(sources / "bert", tmp_path / "out", {"*.word_embeddings": scheme}, layout=layout)
    assert report.passed
    assert report.size.weights_bytes < whole.size.weights_bytes
    assert report.fidelity[0].cosine is not None
    assert report.fidelity[0].cosine > 0.99


SCHEMES = [
    f"int{bits}-{granularity}{asym}"
    for bits in (4, 8)
    for granularity in ("tensor", "channel", "g16")
    for asym in ("", "-asym")
]
SCHEMES += [f"int8-{granularity}{asym}-a8" for granularity in ("tensor", "channel") for asym in ("", "-asym")]


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 48)

    def forward(self, indices: Tensor) -> Tensor:
        return self.table(indices)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_come_out_as_they_are_dequantized(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    indices = torch.arange(50).reshape(5, 10)
    model = model_of(Lookup(), example_inputs={"indices": indices}, input_names=("indices",))
    tensor = nearest(model.read("table.weight"), QuantScheme.parse(scheme))
    artifact = publish(model, trace(model), {"table": tensor}, tmp_path / "out")
    (found,) = file_session(artifact.folder / GRAPH).run(None, {"indices": indices.numpy()})
    assert largest_difference(found.reshape(50, 48), tensor.dequantize().numpy()) < 1e-6
    assert parity(artifact) < 1e-6
