"""Greedy text of the real decoder, weights only: torch on the dequantized weights, ONNX Runtime, onnxruntime-genai."""

from __future__ import annotations

from pathlib import Path

import pytest
from generation import genai_tokens, keep_activations_float, onnxruntime_tokens, torch_tokens

from qconvert import Recipe, convert
from qconvert.load import load
from qconvert.plan import plan
from qconvert.plugin.host.manager import plugin_manager
from qconvert.storage.artifact_reader import ArtifactReader
from qconvert.storage.reader import read_index
from qconvert.trace import trace

NEW = 64


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel"])
def test_the_same_text_everywhere(scheme: str, models: Path, tmp_path: Path) -> None:
    """64 tokens after a sentence, the head quantized too."""
    recipe = Recipe.from_settings(
        {
            "model": str(models / "smollm2-offgrid"),
            "output": tmp_path / "out",
            "scheme": scheme,
            "rules": [{"pattern": "lm_head", "scheme": scheme}],
            "verify": False,
        }
    )
    convert(recipe)
    model = load(recipe.model, lambda source: None)
    quantizer = plugin_manager().quantizer(recipe.quantizer, recipe.options)
    made = plan(model, trace(model), recipe, quantizer)
    artifact = ArtifactReader(recipe.output, model, made, read_index(recipe.output))
    keep_activations_float(artifact)
    assert model.encode_text is not None
    prompt = list(model.encode_text("The secret of life is that everything changes, and so"))
    expected = torch_tokens(artifact, prompt, NEW)
    assert len(set(expected)) > NEW // 8  # no endless repetition of a word
    assert onnxruntime_tokens(artifact, prompt, NEW) == expected
    assert genai_tokens(artifact, prompt, NEW) == expected
