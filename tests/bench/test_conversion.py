"""Time and memory of a whole conversion, beside onnxruntime-genai's model builder on the same folder."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from . import process

QCONVERT = [sys.executable, "-m", "qconvert", "run", "--quantizer", "absmax", "--scheme", "int4-g32", "--no-verify", "--force"]
ROUNDS = 3


def convert(model: Path, output: Path) -> process.Cost:
    return process.run([*QCONVERT, "--model", str(model), "--output", str(output)])


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_genai") is None, reason="needs onnxruntime-genai")
def test_time_and_memory_beside_the_builder(models: Path, tmp_path: Path) -> None:
    """At most 1.2 times the builder's time, and less resident memory; the best of three alternating runs of each."""
    ours, theirs = [], []
    for _ in range(ROUNDS):
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        shutil.rmtree(tmp_path / "theirs", ignore_errors=True)
        theirs.append(process.run([*builder, "-m", str(models / "smollm2"), "-o", str(tmp_path / "theirs")]))
        ours.append(convert(models / "smollm2", tmp_path / "ours"))
    seconds = min(cost.seconds for cost in ours), min(cost.seconds for cost in theirs)
    resident = max(cost.peak_resident for cost in ours), max(cost.peak_resident for cost in theirs)
    print(f"\n{seconds[0]:.1f} s, builder {seconds[1]:.1f} s: {seconds[0] / seconds[1]:.2f} x the time")
    megabytes = [size / 1e6 for size in resident]
    print(f"{megabytes[0]:.0f} MB resident, builder {megabytes[1]:.0f} MB: {resident[0] / resident[1]:.2f} x the memory")
    assert seconds[0] <= 1.2 * seconds[1]
    assert resident[0] < resident[1]


def test_memory_does_not_grow_with_depth(models: Path, tmp_path: Path) -> None:
    """A copy of the model with twice the layers raises the peak of anonymous memory by less than 10 %."""
    once = convert(models / "smollm2", tmp_path / "once")
    twice = convert(twice_as_deep(models / "smollm2", tmp_path / "deep"), tmp_path / "twice")
    growth = twice.peak_anonymous / once.peak_anonymous - 1
    peaks = [round(cost.peak_anonymous / 1e6) for cost in (once, twice)]
    print(f"\npeak anonymous memory: {peaks[0]} MB, twice as deep {peaks[1]} MB: {growth:+.1%}")
    assert growth < 0.10


def twice_as_deep(source: Path, target: Path) -> Path:
    """A checkpoint whose blocks are each there twice."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    layers = config["num_hidden_layers"]
    config["num_hidden_layers"] = 2 * layers
    if config.get("layer_types"):
        config["layer_types"] *= 2
    (target / "config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        tensors[name] = tensor
        prefix, separator, rest = name.partition(".layers.")
        if separator:
            index, _, leaf = rest.partition(".")
            tensors[f"{prefix}.layers.{int(index) + layers}.{leaf}"] = tensor.clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
