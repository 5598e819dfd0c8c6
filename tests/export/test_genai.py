"""Decoders in onnxruntime-genai: the folder runs as it is, and says what the plain loop and torch say."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporting import publish, quantize_nearest
from generation import PROMPT, genai_batch, genai_tokens, keep_activations_float, onnxruntime_tokens, torch_tokens
from torch import Tensor
from trace_models import ENCODERS, traced

from qconvert.ir.artifact import GENAI_CONFIG
from qconvert.ir.scheme import QuantScheme
from qconvert.storage.artifact_reader import ArtifactReader

DECODERS = ("llama", "gpt2", "smollm3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A decoder by name and scheme, whose MatMulNBits does not round activations; made once."""
    base = tmp_path_factory.mktemp("decoders")

    @cache
    def make(name: str, scheme: str) -> ArtifactReader:
        model = traced(name).model

        def inside(layer: str, weight: Tensor) -> QuantScheme | None:
            return QuantScheme.parse(scheme) if model.block_of(layer) else None

        artifact = publish(model, traced(name).template, quantize_nearest(model, inside), base / f"{name}-{scheme}")
        keep_activations_float(artifact)
        return artifact

    return make


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


def test_a_batch_is_padded_behind_its_rows(folders: Any) -> None:
    """As encode_batch does. It marks no other padding in its attention mask, so before a row it is read as tokens."""
    artifact = folders("llama", "int4-g16")
    rows = [PROMPT, PROMPT[:4]]
    alone = [genai_tokens(artifact, row) for row in rows]
    padding = [json.loads((artifact.folder / GENAI_CONFIG).read_text())["model"]["pad_token_id"]] * (len(PROMPT) - 4)
    behind, before = (
        genai_batch(artifact, np.array([rows[0], row], np.int32)) for row in (rows[1] + padding, padding + rows[1])
    )
    assert behind == alone
    assert before[0] == alone[0]
    assert before[1] != alone[1]


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
