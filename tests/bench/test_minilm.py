"""MiniLM with int8 activations beside ONNX Runtime's own quantize_dynamic on the plain export of the same model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import AutoModel

from qconvert import Recipe, convert
from qconvert.calibrate import read_samples
from qconvert.graph.float_graph import float_graph
from qconvert.ir.artifact import SIDECAR, WEIGHTS
from qconvert.ir.batch import Batch
from qconvert.load import load
from qconvert.trace import trace

from .encoder_speed import session

ROUNDS, SENTENCES = 8, 256
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Artifact -> (lowest cosine to float, lowest correlation of pairwise similarities).
LIMITS = {
    "per-channel": (0.997, 0.998),
    "int8 embedding": (0.997, 0.998),
    "smoothquant": (0.9992, 0.9995),
    "llm-int8": (0.9992, 0.9995),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "per-channel": {"quantizer": "per-channel"},
    "int8 embedding": {
        "quantizer": "per-channel",
        "rules": [{"pattern": f"*.{part}_embeddings", "scheme": "int8-channel-a8"} for part in ("word", "position")],
    },
    # Behind a BERT's norms no scale can be folded: only this layout keeps it.
    "smoothquant": {"quantizer": "smoothquant", "layout": "onnx"},
    "llm-int8": {"quantizer": "llm-int8"},
}


def write_plain(folder: Path, path: Path, opset: int = 23) -> None:
    """The float graph that torch's exporter makes of the transformers model, as anyone would export it."""
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    inputs = {name: torch.ones(2, 3, dtype=torch.long) for name in INPUTS}
    shapes = {name: {0: "batch", 1: "sequence"} for name in INPUTS}
    with torch.no_grad():
        program = torch.onnx.export(
            model, kwargs=inputs, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
        )
    assert program is not None
    program.save(str(path), external_data=False)


def write_float(folder: Path, path: Path) -> None:
    """The float graph that qconvert itself compares with, as a file of its own."""
    model = load(str(folder), lambda source: None)
    template = trace(model)
    graph = float_graph(template.graphs["model"], model.parameter_shapes)
    for name, value in graph.graph.initializers.items():
        if isinstance(value.const_value, onnx_ir.LazyTensor):
            value.const_value = onnx_ir.tensor(model.read(name).float().numpy(), name=name)
    onnx_ir.save(graph, path)


def embed(run: Any, batch: Batch) -> torch.Tensor:
    states = torch.from_numpy(run.run(None, {name: value.numpy() for name, value in batch.items()})[0])
    mask = batch["attention_mask"].unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)  # type: ignore[no-any-return]


def race(paths: dict[str, Path]) -> dict[str, float]:
    """Name -> least seconds of a run. All take turns, in processes of their own: where a graph's tensors come to lie in memory
    moves its speed by 10 %, and what else the machine does only makes it slower."""
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(ROUNDS):
        for name in paths if number % 2 == 0 else reversed(paths):
            command = [sys.executable, str(Path(__file__).with_name("encoder_speed.py")), str(paths[name])]
            seconds[name].append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return {name: min(taken) for name, taken in seconds.items()}


def similarities(vectors: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs of vectors [n, width]."""
    directions = torch.nn.functional.normalize(vectors)
    first, second = torch.triu_indices(len(vectors), len(vectors), 1)
    return (directions @ directions.T)[first, second]


def test_speed_and_cosine(models: Path, data: Path, tmp_path: Path) -> None:
    """Pooled sentence vectors compared with float, and speed beside quantize_dynamic per channel, one thread."""
    settings: dict[str, Any] = {
        "model": str(models / "minilm"),
        "calibration": {"source": str(data / "calibration.txt"), "samples": 64, "length": 128},
        "evaluation": {"source": str(data / "evaluation.txt"), "samples": SENTENCES, "length": 128},
        "verify": False,
    }
    for name, own in SETTINGS.items():
        convert(Recipe.from_settings({**settings, **own, "output": tmp_path / name}))
    write_plain(models / "minilm", tmp_path / "plain.onnx")
    write_float(models / "minilm", tmp_path / "float.onnx")
    quantize_dynamic(
        onnx.load(tmp_path / "plain.onnx"),
        tmp_path / "dynamic.onnx",
        per_channel=True,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
    )
    paths = {
        "plain float": tmp_path / "plain.onnx",
        "qconvert's float": tmp_path / "float.onnx",
        "quantize_dynamic": tmp_path / "dynamic.onnx",
        **{name: tmp_path / name / "model.onnx" for name in SETTINGS},
    }
    speed = race(paths)
    recipe = Recipe.from_settings({**settings, "verify": True, "output": tmp_path / "none"})
    batches = read_samples(load(str(models / "minilm"), lambda source: None), recipe, calibrated=False).evaluation
    vectors = {name: torch.cat([embed(session(path), batch) for batch in batches]) for name, path in paths.items()}
    expected = vectors["plain float"]
    print(f"\n{'':18}{'cosine':>9}{'correlation':>13}{'x plain float':>15}{'x quantize_dynamic':>20}")
    found = {}
    for name, mine in vectors.items():
        cosine = float(torch.nn.functional.cosine_similarity(mine, expected).mean())
        correlation = float(torch.corrcoef(torch.stack([similarities(mine), similarities(expected)]))[0, 1])
        found[name] = cosine, correlation
        relative = speed["plain float"] / speed[name], speed["quantize_dynamic"] / speed[name]
        print(f"{name:18}{cosine:9.5f}{correlation:13.5f}{relative[0]:15.2f}{relative[1]:20.2f}")
    for name, limits in LIMITS.items():
        assert all(value >= limit for value, limit in zip(found[name], limits, strict=True)), name
    for name in ("per-channel", "int8 embedding"):
        assert speed[name] <= speed["quantize_dynamic"]
    assert speed["smoothquant"] <= speed["per-channel"] / 0.9
    weights = sum((tmp_path / "int8 embedding" / file).stat().st_size for file in (WEIGHTS, SIDECAR))
    print(f"int8 embedding: {weights / 1e6:.1f} MB of weights")
    assert weights <= 24e6
    assert speed["qconvert's float"] < speed["plain float"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
