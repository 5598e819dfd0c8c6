"""MiniLM with int8 activations beside ONNX Runtime's own quantize_dynamic on the plain export of the same model."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import AutoModel

from qconvert import Recipe, convert
from qconvert.calibrate import read_samples
from qconvert.ir.artifact import SIDECAR, WEIGHTS
from qconvert.ir.float_graph import float_graph
from qconvert.ir.layer import Batch
from qconvert.load import load
from qconvert.trace import trace

BATCH, LENGTH, REPEATS, SENTENCES = 16, 128, 12, 256
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Artifact -> (lowest cosine to float, lowest speed relative to quantize_dynamic).
LIMITS = {"per-channel": (0.997, 1.0), "int8 embedding": (0.997, 1.0), "llm-int8": (0.999, 0.85)}
SETTINGS: dict[str, dict[str, Any]] = {
    "per-channel": {"quantizer": "per-channel"},
    "int8 embedding": {
        "quantizer": "per-channel",
        "rules": [{"pattern": f"*.{part}_embeddings", "scheme": "int8-channel-a8"} for part in ("word", "position")],
    },
    "llm-int8": {"quantizer": "llm-int8"},
}


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def write_plain(folder: Path, path: Path) -> None:
    """The float graph that torch's exporter makes of the transformers model, as anyone would export it."""
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    inputs = {name: torch.ones(2, 3, dtype=torch.long) for name in INPUTS}
    shapes = {name: {0: "batch", 1: "sequence"} for name in INPUTS}
    with torch.no_grad():
        program = torch.onnx.export(model, kwargs=inputs, dynamo=True, opset_version=23, dynamic_shapes=shapes, verbose=False)
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
    return (states * mask).sum(1) / mask.sum(1)


def test_speed_and_cosine(models: Path, data: Path, tmp_path: Path) -> None:
    """Cosine of pooled sentence vectors to float, and speed relative to quantize_dynamic per channel, one thread."""
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
    sessions = {
        "plain float": session(tmp_path / "plain.onnx"),
        "qconvert's float": session(tmp_path / "float.onnx"),
        "quantize_dynamic": session(tmp_path / "dynamic.onnx"),
        **{name: session(tmp_path / name / "model.onnx") for name in SETTINGS},
    }
    recipe = Recipe.from_settings({**settings, "verify": True, "output": tmp_path / "none"})
    batches = read_samples(load(str(models / "minilm"), lambda source: None), recipe, calibrated=False).evaluation
    expected = torch.cat([embed(sessions["plain float"], batch) for batch in batches])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    ids = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) * 7919 % 30000 + 5
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    for _ in range(REPEATS + 1):
        for name, run in sessions.items():
            start = time.perf_counter()
            run.run(None, feeds)
            times[name].append(time.perf_counter() - start)
    speed = {name: median(taken[1:]) for name, taken in times.items()}
    print(f"\n{'':18}{'cosine':>9}{'x plain float':>15}{'x quantize_dynamic':>20}")
    cosines = {}
    for name, run in sessions.items():
        found = torch.cat([embed(run, batch) for batch in batches])
        cosines[name] = float(torch.nn.functional.cosine_similarity(found, expected).mean())
        relative = speed["quantize_dynamic"] / speed[name]
        print(f"{name:18}{cosines[name]:9.5f}{speed['plain float'] / speed[name]:15.2f}{relative:20.2f}")
    for name, (cosine, ratio) in LIMITS.items():
        assert cosines[name] >= cosine
        assert speed["quantize_dynamic"] / speed[name] >= ratio
    weights = sum((tmp_path / "int8 embedding" / file).stat().st_size for file in (WEIGHTS, SIDECAR))
    print(f"int8 embedding: {weights / 1e6:.1f} MB of weights")
    assert weights <= 24e6
    assert speed["qconvert's float"] < speed["plain float"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
