"""MiniLM with int8 activations beside ONNX Runtime's own quantize_dynamic, on the same float graph."""

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

from qconvert import Recipe, convert
from qconvert.calibrate import read_samples
from qconvert.ir.float_graph import float_graph
from qconvert.ir.layer import Batch
from qconvert.ir.model import Model
from qconvert.load import load
from qconvert.trace import trace

BATCH, LENGTH, REPEATS, SENTENCES = 16, 128, 12, 256
LIMITS = {"per-channel": 0.997, "llm-int8": 0.999}


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def write_float(model: Model, path: Path) -> None:
    """The float graph that qconvert itself compares with, as a file of its own."""
    template = trace(model)
    graph = float_graph(template.graph, model.parameter_shapes)
    for name, value in graph.graph.initializers.items():
        if isinstance(value.const_value, onnx_ir.LazyTensor):
            value.const_value = onnx_ir.tensor(model.read(name).float().numpy(), name=name)
    for node in list(graph.graph):
        # quantize_dynamic takes weights only where they are an initializer of the MatMul itself.
        if node.op_type == "Transpose" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            array = np.ascontiguousarray(node.inputs[0].const_value.numpy().T)  # type: ignore[union-attr]
            weight = onnx_ir.Value(name=f"{node.name}/folded", const_value=onnx_ir.tensor(array))
            weight.shape, weight.type = onnx_ir.Shape(array.shape), onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
            graph.graph.register_initializer(weight)
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], weight)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(graph)
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
    for quantizer in LIMITS:
        convert(Recipe.from_settings({**settings, "quantizer": quantizer, "output": tmp_path / quantizer}))
    model = load(str(models / "minilm"), lambda source: None)
    write_float(model, tmp_path / "float.onnx")
    float_model = onnx.load(tmp_path / "float.onnx")
    quantize_dynamic(
        float_model, tmp_path / "dynamic.onnx", per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"]
    )
    sessions = {
        "float": session(tmp_path / "float.onnx"),
        "quantize_dynamic": session(tmp_path / "dynamic.onnx"),
        **{name: session(tmp_path / name / "model.onnx") for name in LIMITS},
    }
    recipe = Recipe.from_settings({**settings, "verify": True, "output": tmp_path / "none"})
    batches = read_samples(model, recipe, calibrated=False).evaluation
    expected = torch.cat([embed(sessions["float"], batch) for batch in batches])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    ids = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) * 7919 % 30000 + 5
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    for _ in range(REPEATS + 1):
        for name, run in sessions.items():
            start = time.perf_counter()
            run.run(None, feeds)
            times[name].append(time.perf_counter() - start)
    speed = {name: median(taken[1:]) for name, taken in times.items()}
    print(f"\n{'':18}{'cosine':>9}{'x float':>9}{'x quantize_dynamic':>20}")
    cosines = {}
    for name, run in sessions.items():
        found = torch.cat([embed(run, batch) for batch in batches])
        cosines[name] = float(torch.nn.functional.cosine_similarity(found, expected).mean())
        relative = speed["quantize_dynamic"] / speed[name]
        print(f"{name:18}{cosines[name]:9.5f}{speed['float'] / speed[name]:9.2f}{relative:20.2f}")
    for name, limit in LIMITS.items():
        assert cosines[name] >= limit
    assert {name: speed["quantize_dynamic"] / speed[name] >= 0.85 for name in LIMITS} == dict.fromkeys(LIMITS, True)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
