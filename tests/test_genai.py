"""Decoders in onnxruntime-genai: the folder runs as it is, and says what the plain loop and torch say."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exporting import publish, quantize_nearest
from torch import Tensor
from trace_models import ENCODERS, traced

from qconvert.ir.artifact import GENAI_CONFIG, GRAPH
from qconvert.ir.forward import materialize
from qconvert.ir.runtime import file_session
from qconvert.ir.scheme import QuantScheme
from qconvert.verify.parity import Artifact

PROMPT, NEW = [5, 17, 3, 60, 8, 2, 33, 41, 12], 24
DECODERS = ("llama", "gpt2", "smollm3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A decoder by name and scheme, whose MatMulNBits does not round activations; made once."""
    base = tmp_path_factory.mktemp("decoders")

    @cache
    def make(name: str, scheme: str) -> Artifact:
        model = traced(name).model

        def inside(layer: str, weight: Tensor) -> QuantScheme | None:
            return QuantScheme.parse(scheme) if model.block_of(layer) else None

        artifact = publish(model, traced(name).template, quantize_nearest(model, inside), base / f"{name}-{scheme}")
        graph = onnx.load(artifact.folder / GRAPH, load_external_data=False)
        for node in graph.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 1
        onnx.save(graph, artifact.folder / GRAPH)
        return artifact

    return make


def torch_tokens(artifact: Artifact) -> list[int]:
    """Greedy, on the dequantized weights, without a cache."""
    model, tokens = artifact.model, list(PROMPT)
    with torch.no_grad(), ExitStack() as weights:
        for unit in ("", *model.blocks):
            weights.enter_context(materialize(model, unit, artifact.read))
        for _ in range(NEW):
            ids = torch.tensor([tokens])
            logits = model.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def onnxruntime_tokens(artifact: Artifact) -> list[int]:
    """Greedy, with the KV cache going out of one step and into the next."""
    session = file_session(artifact.folder / GRAPH)
    names = [output.name for output in session.get_outputs()]
    past = {
        each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past")
    }
    tokens, new = list(PROMPT), list(PROMPT)
    for _ in range(NEW):
        feeds = {"input_ids": np.array([new]), "attention_mask": np.ones((1, len(tokens)), np.int64), **past}
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        new = [int(outputs["logits"][0, -1].argmax())]
        tokens += new
    return tokens[len(PROMPT) :]


def genai_tokens(artifact: Artifact) -> list[int]:
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(artifact.folder))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(PROMPT) + NEW, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(np.array(PROMPT, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(PROMPT) :]


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_are_those_of_torch_on_the_dequantized_weights(name: str, folders: Any) -> None:
    artifact = folders(name, "int4-g16")
    expected = torch_tokens(artifact)
    assert len(set(expected)) > 1
    assert onnxruntime_tokens(artifact) == expected
    assert genai_tokens(artifact) == expected


@pytest.mark.parametrize("scheme", ["int8-g16", "int8-channel-a8"])
def test_int8_folders_run_as_they_are(scheme: str, folders: Any) -> None:
    artifact = folders("llama", scheme)
    assert genai_tokens(artifact) == onnxruntime_tokens(artifact)


def test_the_configuration_names_the_cache_the_context_and_the_ends(folders: Any) -> None:
    config = json.loads((folders("llama", "int4-g16").folder / GENAI_CONFIG).read_text())
    decoder = config["model"]["decoder"]
    assert config["model"]["context_length"] == config["search"]["max_length"] == 64
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (4, 2, 16)
    assert decoder["num_attention_heads"] == 4
    assert config["model"]["pad_token_id"] == 0


def test_encoders_have_none(tmp_path: Path) -> None:
    name = next(iter(ENCODERS))
    encoder = traced(name)
    assert not (publish(encoder.model, encoder.template, {}, tmp_path / "out").folder / GENAI_CONFIG).exists()
