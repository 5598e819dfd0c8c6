"""prefill: int8 beside one body for prompts and decoding, and beside onnxruntime-genai's builder: speed, loss, loading."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qconvert import convert
from qconvert.ir.artifact import GRAPH

from .test_decoder import kl, race, recipe, show, size

PROMPTS = (128, 1024)
PIECE = 256  # of a long prompt, that onnxruntime-genai reads at once if it is told to
ROUNDS = 4


def test_two_bodies_beside_one(models: Path, data: Path, tmp_path: Path) -> None:
    """SmolLM2, awq int4-g32 with head and embedding: prompts faster, decoding as fast, nothing more on disk but a graph."""
    pytest.importorskip("onnxruntime_genai")
    builder = tmp_path / "builder"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    source = str(models / "smollm2-offgrid")
    subprocess.run([*command, "-m", source, "-o", str(builder), "-c", str(tmp_path / "cache")], check=True, capture_output=True)
    made = [
        recipe(
            models,
            data,
            tmp_path / prefill,
            quantizer="awq",
            scheme="int4-g32",
            rules=[{"pattern": "lm_head", "scheme": "int4-g32"}],
            prefill=prefill,
        )
        for prefill in ("same", "int8")
    ]
    for each in made:
        convert(each)
    folders = [builder, *(each.output for each in made)]
    lost = kl(folders, made[0])
    words = {folder.name: f"{size(folder) / 1e6:.1f} MB, KL {lost[folder.name]:.4f}" for folder in folders}
    ratios = {}
    for length in PROMPTS:
        print(f"\nprompt of {length} tokens", end="")
        ratios[length] = show(race(folders, length, ROUNDS), "builder", words, length)
    print(f"\nprompt of {PROMPTS[-1]} tokens in pieces of {PIECE}", end="")
    show(race(folders, PROMPTS[-1], ROUNDS, [PIECE]), "builder", words, PROMPTS[-1])
    for folder in folders[1:]:
        command = [sys.executable, str(Path(__file__).with_name("session_cost.py")), str(folder / GRAPH)]
        cost = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(folder.name, {name: round(value, 2) for name, value in cost.items()})
    print(f"KL of prompts {lost['int8'] / lost['same']:.3f} x, size {size(made[1].output) / size(builder):.3f} x the builder's")
    for length in PROMPTS:
        assert ratios[length]["int8"][0] > ratios[length]["same"][0]
