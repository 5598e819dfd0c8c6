"""Every architecture, tiny and random, from a folder: stamped, exported, the same as torch, and the same text.

Makes docs/architectures.md:

python tests/trace/test_architectures.py > docs/architectures.md
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_models import DECODERS, ENCODER_DECODERS, ENCODERS, VOCABULARY, build
from exporting import parity, publish, quantize_nearest
from generation import (
    genai_tokens,
    keep_activations_float,
    onnxruntime_answer,
    onnxruntime_logits,
    onnxruntime_tokens,
    torch_answer,
    torch_logits,
    torch_tokens,
)
from onnx_ir import DataType
from torch import Tensor

from qconvert.graph import cuda_kernels
from qconvert.graph.float_graph import float_graph
from qconvert.graph.half_precision import narrow
from qconvert.ir.model import Model, stack_of
from qconvert.ir.scheme import QuantScheme
from qconvert.ir.template import Template
from qconvert.ort.compare import largest_difference
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.trace import trace
from qconvert.verify.parity import TOLERANCE

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
UNREPEATED = ("albert",)  # one block, which is traced as often as it runs
UNFUSED = ("mpnet",)  # its relative positions are a bias that MultiHeadAttention is not given


@cache
def traced(name: str) -> tuple[Model, Template]:
    model = build(name)
    return model, trace(model)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The artifact of an architecture, int4 inside its blocks, made once."""
    folder = tmp_path_factory.mktemp("architectures")

    @cache
    def make(name: str) -> ArtifactReader:
        model, template = traced(name)

        def inside(layer: str, weight: Tensor) -> QuantScheme | None:
            return QuantScheme.parse("int4-g16") if model.block_of(layer) or name in UNREPEATED else None

        return publish(model, template, quantize_nearest(model, inside), folder / name)

    return make


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, *ENCODER_DECODERS])
def test_blocks_are_traced_once_per_kind_and_stamped(name: str) -> None:
    model, template = traced(name)
    places, *_ = ({**DECODERS, **ENCODERS, **ENCODER_DECODERS})[name]
    assert [stack_of(stack[0]) for stack in model.stacks] == ([places] if isinstance(places, str) else list(places))
    kinds = set(template.representatives.values())
    assert list(template.representatives) == list(model.blocks)
    assert len(kinds) < len(model.blocks) or (name in UNREPEATED and not model.blocks)
    ops = Counter(node.op_type for graph in template.graphs.values() for node in graph.graph)
    attention = "GroupQueryAttention" if name in DECODERS else "MultiHeadAttention"
    cross = len(model.stacks[1]) if name in ENCODER_DECODERS else 0
    runs = model.module.config.num_hidden_layers if name in UNREPEATED else len(model.blocks)  # type: ignore[union-attr]
    assert ops[attention] == (0 if name in UNFUSED else runs + cross)  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [DataType.FLOAT16, DataType.BFLOAT16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, *ENCODER_DECODERS])
def test_cuda_has_a_kernel_for_every_node(name: str, dtype: DataType) -> None:
    model, template = traced(name)
    for part in template.graphs.values():
        graph = float_graph(part, model.parameter_shapes).graph
        narrow(graph, dtype)
        cuda_kernels.check_kernels(graph)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, *ENCODER_DECODERS])
def test_the_graph_computes_what_its_dequantized_weights_say(name: str, artifacts: Any) -> None:
    artifact = artifacts(name)
    assert artifact.plan.layers
    assert parity(artifact) < TOLERANCE


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_reads_on_through_its_cache_as_torch_reads_at_once(name: str, artifacts: Any) -> None:
    artifact = artifacts(name)
    keep_activations_float(artifact)
    tokens = torch.randint(3, VOCABULARY, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    error = largest_difference(onnxruntime_logits(artifact.folder, tokens, prompt=9), torch_logits(artifact, tokens))
    assert error < TOLERANCE


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_writes_the_text_that_torch_writes(name: str, artifacts: Any) -> None:
    artifact = artifacts(name)
    keep_activations_float(artifact)
    expected = torch_tokens(artifact)
    assert onnxruntime_tokens(artifact) == expected
    assert genai_tokens(artifact) == expected


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_decoder_reads_on_through_its_cache_as_torch_reads_at_once(name: str, artifacts: Any) -> None:
    artifact = artifacts(name)
    keep_activations_float(artifact)
    tokens = torch.randint(3, VOCABULARY, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    _, expected = torch_answer(artifact, tokens, new=0)
    _, found = onnxruntime_answer(artifact, tokens, new=0, steps=(9, 1, 1, 5, 1, 7))
    assert largest_difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_decoder_writes_the_text_that_torch_writes(name: str, artifacts: Any) -> None:
    artifact = artifacts(name)
    keep_activations_float(artifact)
    start = [artifact.model.decoder_start]
    expected, _ = torch_answer(artifact, start, new=24)
    found, _ = onnxruntime_answer(artifact, start, new=24)
    assert found == expected


def document() -> str:
    """docs/architectures.md, from the lists that the tests above go through."""
    lines = [
        "# Architectures",
        "",
        "Made from the tests (`PYTHONPATH=tests:tests/support python tests/trace/test_architectures.py >",
        "docs/architectures.md`): of each, a tiny random model is loaded from a folder that transformers saved, traced one",
        "block per kind, exported with int4 weights and compared with torch; decoders and encoder-decoders also write the same",
        "text as torch in ONNX Runtime, decoders in onnxruntime-genai too. There is no list in the code: others that",
        "transformers has a class for are tried in the same way, and a graph that does not compute what torch computes is",
        "refused.",
        "",
        "| architecture | task | attention | with |",
        "|---|---|---|---|",
    ]
    for name, (_, _, special) in DECODERS.items():
        lines.append(f"| {name} | text generation | GroupQueryAttention | {special} |")
    for name, (_, _, special) in ENCODERS.items():
        attention = "plain ops" if name in UNFUSED else "MultiHeadAttention"
        lines.append(f"| {name} | text encoder | {attention} | {special} |")
    for name, (_, _, special) in ENCODER_DECODERS.items():
        lines.append(f"| {name} | text to text | MultiHeadAttention | {special} |")
    return "\n".join(line.replace("|  |", "| |") for line in lines) + "\n"


def test_the_document_lists_what_is_tested() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document()


if __name__ == "__main__":
    print(document(), end="")
